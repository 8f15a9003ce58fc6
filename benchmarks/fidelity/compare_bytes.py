"""Tables from results of ``quantised_caches.py``: caches without eviction, and arms at their bytes.

    python benchmarks/fidelity/compare_bytes.py test.jsonl quantised.jsonl \\
        [--against results-bytes.jsonl [more.jsonl ...]] [--csv quantised.csv]

``--against`` takes results of ``reasonalloc fidelity`` whose budgets count tokens of 16 bits. A
cache is compared up to the length at which it takes the bytes of such a budget, and over whole
texts with the budget that takes its bytes. Bytes are counted in two ways, alike for both sides:

    coded:   right after a compression, and with all tokens of the quantised cache coded;
    largest: with the tokens since the last compression, and the residual in 16 bits, at the moment
             when there are most.

Ratios are paired by text; intervals are 95 % percentile bootstraps over texts.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from summarise import read_texts

from reasonalloc.evaluation.intervals import bootstrap_ratio

Row = dict[str, Any]


def read(path: Path) -> tuple[Row, list[Row]]:
    """Manifest and rows of a result file."""
    first, *rows = map(json.loads, path.read_text().splitlines())
    return first["manifest"], rows


class Quantised:
    """A cache on several texts; sizes are in tokens of 16 bits.

    Args:
        rows: of the cache, by text.
        wide: bytes of a token in 16 bits.
    """

    def __init__(self, rows: dict[str, Row], wide: int) -> None:
        self.rows, self.wide = rows, wide
        one = next(iter(rows.values()))
        self.share: float = one["coded_bytes"] / one["coded"] / wide
        for row in rows.values():  # what is computed for every length must be what was counted
            if abs(self.held(row, self.length(row)) * wide - row["kv_bytes"]) > 1e-3 * wide:
                raise SystemExit(f"{row['cache']}: bytes at the end are not those of its layout")

    @staticmethod
    def length(row: Row) -> int:
        """Tokens in the cache at the end."""
        return int(row["prompt"] + len(row["kl"]))

    def held(self, row: Row, length: int) -> float:
        """Size at a length, with the residual in 16 bits."""
        codings, residual = divmod(length - int(row["prompt"]), int(row["period"]))
        residual += int(row["uncoded"])
        if codings == 0 and not row["prompt_coded"]:
            residual = length
        return self.share * (length - residual) + residual

    def largest(self, row: Row, length: int) -> float:
        """Largest size up to a length."""
        return max(self.held(row, n) for n in range(row["prompt"], length + 1))

    def reach(self, row: Row, size: float) -> int:
        """Length up to which the cache is never larger; 0 if it begins so."""
        for length in range(row["prompt"], self.length(row) + 1):
            if self.held(row, length) > size:
                return length - 1 if length > row["prompt"] else 0
        return self.length(row)


def pair(ours: list[list[float]], theirs: list[list[float]]) -> str:
    """Cells: mean KL of both, and the ratio of ours to theirs."""
    tokens = sum(map(len, ours))
    top, bottom = [sum(x) for x in ours], [sum(x) for x in theirs]
    low, high = bootstrap_ratio(top, bottom)
    ratio = sum(top) / sum(bottom)
    return (
        f"{sum(bottom) / tokens:.4f} | {sum(top) / tokens:.4f} | {ratio:.3f} ({low:.3f}-{high:.3f})"
    )


def alone(caches: dict[str, Quantised]) -> list[str]:
    """One line per cache: bits, KL, and the size of the longest text."""
    lines = [
        "| cache | bits | texts | KL | tokens of 16 bits: coded | largest | at the end |",
        "|---" * 7 + "|",
    ]
    for name, cache in caches.items():
        row = max(cache.rows.values(), key=cache.length)
        end = cache.length(row)
        kl = [x for r in cache.rows.values() for x in r["kl"]]
        lines.append(
            f"| `{name}` | {16 * cache.share:.2f} | {len(cache.rows)} | {sum(kl) / len(kl):.5f} | "
            f"{cache.share * end:.0f} | {cache.largest(row, end):.0f} | "
            f"{cache.held(row, end):.0f} of {end} |"
        )
    return lines


def at_budgets(cache: Quantised, budgets: dict[int, dict[str, Row]], interval: int) -> list[str]:
    """Lines for the length at which the cache takes the bytes of a budget."""
    lines = []
    for budget, arm in sorted(budgets.items()):
        keys = [key for key in cache.rows if key in arm]
        for counted in ("coded", "largest"):
            ours, theirs, reached = [], [], set()
            for key in keys:
                row = cache.rows[key]
                length = min(int(budget / cache.share), cache.length(row))
                if counted == "largest":
                    length = cache.reach(row, budget + interval)
                # the token with this index is predicted from all before it, the prompt's too
                tokens = length - row["prompt"]
                if tokens > 0:
                    reached.add(length)
                    ours.append(arm[key]["kl"][:tokens])
                    theirs.append(row["kl"][:tokens])
            if not ours or not sum(map(sum, theirs)):
                continue
            span = "-".join(str(n) for n in sorted({min(reached), max(reached)}))
            lines.append(f"{budget} | {counted} | {len(ours)} | {span} | {pair(ours, theirs)} |")
    return lines


def whole_texts(cache: Quantised, budgets: dict[int, dict[str, Row]], interval: int) -> list[str]:
    """Lines for the budgets that take the bytes of the cache over whole texts."""
    row = max(cache.rows.values(), key=cache.length)
    end = cache.length(row)
    sizes = {"coded": cache.share * end, "largest": cache.largest(row, end) - interval}
    lines = []
    for counted, size in sizes.items():
        budget = int(size)
        fits = [b for b in budgets if b <= budget]
        arm = budgets[max(fits)] if fits else {}
        keys = [key for key in cache.rows if key in arm]
        cells = "none | 0 | | | |"
        if keys:
            kl = [x[key]["kl"] for x in (arm, cache.rows) for key in keys]
            cells = f"{max(fits)} | {len(keys)} | {pair(kl[: len(keys)], kl[len(keys) :])} |"
        lines.append(f"{counted} | {budget} | {cells}")
    return lines


def compare(caches: dict[str, Quantised], paths: list[Path]) -> list[str]:
    """Both comparisons with every arm of the files."""
    arms: dict[str, dict[int, dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    intervals = set()
    for path in paths:
        manifest, rows = read(path)
        intervals.add(manifest["interval"])
        for row in rows:
            arms[row["arm"]][row["budget"]][row["trajectory"]] = row
    (interval,) = intervals
    lines = []
    for name, budgets in arms.items():
        both = "KL of the cache | KL of the arm | arm / cache (95 %) |"
        lines += ["", f"`{name}`, while the cache takes the bytes of a budget:", ""]
        lines += [f"| cache | budget | counted | texts | up to token | {both}", "|---" * 8 + "|"]
        for label, cache in caches.items():
            lines += [f"| `{label}` | {x}" for x in at_budgets(cache, budgets, interval)]
        lines += ["", f"`{name}`, at the bytes of the cache over whole texts:", ""]
        lines += [f"| cache | counted | equal budget | measured | texts | {both}", "|---" * 8 + "|"]
        for label, cache in caches.items():
            lines += [f"| `{label}` | {x}" for x in whole_texts(cache, budgets, interval)]
    return lines


def main() -> None:
    """Print the tables; write the mean of every text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("quantised", type=Path)
    parser.add_argument("--against", type=Path, nargs="+", default=[])
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    kinds = {key: row["kind"] for key, row in read_texts(args.texts).items()}
    manifest, rows = read(args.quantised)
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row["cache"]][row["trajectory"]] = row
    caches = {name: Quantised(by, manifest["token_bytes"]) for name, by in found.items()}
    lines = alone(caches)
    if args.against:
        lines += compare(caches, args.against)
    print("\n".join(lines))
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["cache", "kind", "text", "kl"])
            for name, by in found.items():
                for key in (key for key in kinds if key in by):
                    kl = by[key]["kl"]
                    writer.writerow([name, kinds[key], key, f"{sum(kl) / len(kl):.6g}"])


if __name__ == "__main__":
    main()
