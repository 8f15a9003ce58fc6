"""Tables from the results of ``run.sh``: waves against one another, arms against R-KV.

    python benchmarks/referee/tables.py FOLDER [FOLDER ...] > tables.md

Several folders: those of several models, whose waves are compared too. Ratios are of mean KL,
paired by text, with 95 % percentile bootstraps over texts.
"""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fidelity"))
from summarise import BASE, read

from reasonalloc.evaluation.intervals import bootstrap_ratio
from reasonalloc.report.profiles import compare


def waves(paths: list[Path]) -> None:
    """Distance and rank correlation of all pairs."""
    print("| wave | and | EMD | rank correlation |\n|---|---|---|---|")
    for one, two in combinations(paths, 2):
        both = compare(str(one), str(two))
        if both.emd is None or both.rank_correlation is None:
            continue
        names = " | ".join(f"{p.parent.name}/{p.stem.removeprefix('wave-')}" for p in (one, two))
        print(f"| {names} | {both.emd:.3f} | {both.rank_correlation:.2f} |")


def arms(path: Path) -> None:
    """Every arm's KL and its ratio to R-KV's, by budget."""
    table, _ = read([str(path)], 1.0)
    print("| budget | arm | texts | KL | ratio to `rkv` (95 %) |\n|---|---|---|---|---|")
    for budget, arm in sorted(table, key=lambda key: (str(key[0]), key[1] != BASE)):
        ours, base = table[budget, arm], table[budget, BASE]
        common = [text for text in base if text in ours]
        mine, theirs = [ours[text] for text in common], [base[text] for text in common]
        low, high = bootstrap_ratio(mine, theirs)
        name = arm.replace(f"{path.parent}/wave-", "").replace(".json", "")
        ratio = f"{sum(mine) / sum(theirs):.3f} ({low:.3f}-{high:.3f})"
        print(f"| {budget} | `{name}` | {len(common)} | {sum(mine) / len(mine):.4f} | {ratio} |")


def main() -> None:
    """Print everything."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    for folder in folders:
        print(f"\n## {folder.name}\n\n### Waves\n")
        waves(sorted(folder.glob("wave-*.json")))
        for path in sorted(folder.glob("*.jsonl")):
            print(f"\n### {path.stem}\n")
            arms(path)
    if len(folders) > 1:
        print("\n## Waves of several models\n")
        waves(
            [path for folder in folders for path in [folder / "wave-maths.json"] if path.exists()]
        )


if __name__ == "__main__":
    main()
