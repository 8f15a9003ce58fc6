"""Tables from results of ``reasonalloc fidelity``: paired with two arms, by kind of text.

    python benchmarks/fidelity/summarise.py test.jsonl OUT results.jsonl [more.jsonl old.csv ...]

Writes ``OUT.md`` and ``OUT.csv`` (mean KL per text). Ratios and differences are paired by text;
intervals are 95 % percentile bootstraps over texts.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch

from reasonalloc.config import PRESETS
from reasonalloc.evaluation.intervals import bootstrap_ratio
from reasonalloc.texts import Trajectory

BASE, OURS = "rkv", "best"
Table = dict[tuple[int, str], dict[str, float]]


def read(paths: list[str]) -> Table:
    """Mean KL per token of every text, by budget and arm; later files replace earlier ones."""
    names = {str(preset.arm): name for name, preset in PRESETS.items()}
    found: Table = defaultdict(dict)
    for path in paths:
        if path.endswith(".csv"):
            with Path(path).open() as file:
                for row in csv.DictReader(file):
                    found[int(row["budget"]), row["arm"]][row["text"]] = float(row["kl"])
            continue
        for line in Path(path).read_text().splitlines()[1:]:
            row = json.loads(line)
            arm = names.get(row["arm"], row["arm"])
            found[row["budget"], arm][row["trajectory"]] = sum(row["kl"]) / len(row["kl"])
    return dict(found)


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
    kinds = {}
    for line in Path(texts).read_text().splitlines():
        row = json.loads(line)
        key = Trajectory(tuple(row["prompt_ids"]), tuple(row["completion_ids"])).key
        kinds[key] = row["kind"]
    table = read(paths)
    labels = list(dict.fromkeys(kinds.values()))
    lines = [
        "| budget | arm | texts | KL | ratio to `rkv` (95 %) | `best`'s KL less this (95 %) | "
        + " | ".join(labels)
        + " |",
        "|---" * (6 + len(labels)) + "|",
    ]
    for budget, arm in sorted(table, key=lambda k: (k[0], sum(table[k].values()) / len(table[k]))):
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
        writer.writerow(["budget", "arm", "kind", "text", "kl"])
        for (budget, arm), values in sorted(table.items()):
            for key, value in values.items():
                writer.writerow([budget, arm, kinds.get(key, ""), key, f"{value:.6g}"])
    print("\n".join(lines))


if __name__ == "__main__":
    main()
