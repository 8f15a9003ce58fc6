"""Tables from results of ``reasonalloc fidelity``: paired with two arms, by kind of text.

    python benchmarks/fidelity/summarise.py test.jsonl OUT results.jsonl [more.jsonl old.csv ...]

Writes ``OUT.md`` and ``OUT.csv`` (mean KL per text; ``share``: bytes after a compression by those
of the 16-bit full cache at the texts' mean length). Ratios and differences are paired by text;
intervals are 95 % percentile bootstraps over texts.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from reasonalloc.config import PRESETS
from reasonalloc.evaluation.intervals import bootstrap_ratio
from reasonalloc.sizes import read_budget
from reasonalloc.texts import Trajectory

BASE, OURS = "rkv", "best"
Key = tuple[int | str, str]
Table = dict[Key, dict[str, float]]


def read(paths: list[str], length: float) -> tuple[Table, dict[Key, float]]:
    """Mean KL per token of texts, and shares, by budget and arm; later files replace earlier."""
    names = {str(preset.arm): name for name, preset in PRESETS.items()}
    found: Table = defaultdict(dict)
    shares: dict[Key, float] = {}
    for path in paths:
        if path.endswith(".csv"):
            with Path(path).open() as file:
                for row in csv.DictReader(file):
                    key = read_budget(row["budget"]), row["arm"]
                    found[key][row["text"]] = float(row["kl"])
                    shares[key] = float(row["share"])
            continue
        first, *lines = Path(path).read_text().splitlines()
        manifest = json.loads(first)["manifest"]
        for line in lines:
            row = json.loads(line)
            key = row["budget"], names.get(row["arm"], row["arm"])
            found[key][row["trajectory"]] = sum(row["kl"]) / len(row["kl"])
            shares[key] = share(row, manifest, length)
    return dict(found), shares


def share(row: dict[str, Any], manifest: dict[str, Any], length: float) -> float:
    """Bytes by those of the 16-bit full cache; plain tokens count as 16 bits also in float32."""
    plain = manifest["dtype"] == "torch.float32" and "kv_dtype" not in manifest
    if isinstance(row["budget"], int) and (plain or "budget_tokens" not in row):
        return row["budget"] / length
    return row["compressed_kv_bytes"] / row["full_16bit_kv_bytes"]


def read_texts(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file of texts by their fingerprint, in the file's order."""
    rows = map(json.loads, path.read_text().splitlines())
    return {Trajectory(tuple(r["prompt_ids"]), tuple(r["completion_ids"])).key: r for r in rows}


def difference(ours: list[float], base: list[float]) -> tuple[float, float, float]:
    """Mean difference and its interval."""
    gap = torch.tensor(ours, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = gap[torch.randint(0, len(gap), (4000, len(gap)), generator=generator)].mean(1)
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(gap.mean()), low, high


def main() -> None:
    """Print and write the tables."""
    texts, out, *paths = sys.argv[1:]
    rows = read_texts(Path(texts))
    kinds = {key: row["kind"] for key, row in rows.items()}
    lengths = [len(r["prompt_ids"]) + len(r["completion_ids"]) - 1 for r in rows.values()]
    table, shares = read(paths, sum(lengths) / len(lengths))
    labels = list(dict.fromkeys(kinds.values()))
    lines = [
        "| budget | arm | texts | KL | ratio to `rkv` (95 %) | `best`'s KL less this (95 %) | "
        + " | ".join(labels)
        + " |",
        "|---" * (6 + len(labels)) + "|",
    ]
    order = sorted(table, key=lambda k: (shares[k], sum(table[k].values()) / len(table[k])))
    for budget, arm in order:
        if (budget, BASE) not in table:
            continue  # nothing to compare with at this budget
        ours, base = table[budget, arm], table[budget, BASE]
        common = [key for key in kinds if key in ours and key in base]
        mine, theirs = [ours[k] for k in common], [base[k] for k in common]
        low, high = bootstrap_ratio(mine, theirs)
        best, gap = table.get((budget, OURS), {}), ""
        if shared := [key for key in common if key in best]:
            middle, *ends = difference([best[k] for k in shared], [ours[k] for k in shared])
            gap = f"{middle:+.4f} ({ends[0]:+.4f} to {ends[1]:+.4f})"
        cells = []
        for label in labels:
            keys = [k for k in common if kinds[k] == label]
            cells.append(
                f"{sum(ours[k] for k in keys) / sum(base[k] for k in keys):.2f}" if keys else ""
            )
        ratio = sum(mine) / sum(theirs)
        lines.append(
            f"| {budget} | `{arm}` | {len(common)} | {sum(mine) / len(mine):.4f} | "
            f"{ratio:.3f} ({low:.3f}-{high:.3f}) | "
            f"{gap} | " + " | ".join(cells) + " |"
        )
    Path(out + ".md").write_text("\n".join(lines) + "\n")
    with Path(out + ".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["budget", "share", "arm", "kind", "text", "kl"])
        for budget, arm in sorted(table, key=lambda k: (shares[k], k[1])):
            for key, value in table[budget, arm].items():
                part = f"{shares[budget, arm]:.6g}"
                writer.writerow([budget, part, arm, kinds.get(key, ""), key, f"{value:.6g}"])
    print("\n".join(lines))


if __name__ == "__main__":
    main()
