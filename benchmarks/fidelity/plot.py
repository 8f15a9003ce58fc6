"""Plots of the evidence; needs matplotlib.

    python benchmarks/fidelity/plot.py RESULTS.csv [more.csv ...] COSTS.json OUT_FOLDER

``RESULTS.csv`` is from ``summarise.py``, ``COSTS.json`` a cost profile.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import torch
from cycler import cycler

from reasonalloc.allocators.minimise import minimise
from reasonalloc.calibrated.costs import load_costs
from reasonalloc.evaluation.intervals import bootstrap_ratio

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "reasonalloc"
from matplotlib import pyplot as plt  # noqa: E402


def fidelity(paths: list[str], out: Path) -> None:
    """KL against bytes, 95 % intervals over texts."""
    values: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    names = {}
    for path in paths:
        with Path(path).open() as file:
            for row in csv.DictReader(file):
                arm = "best-bytes" if "bits=planned" in row["arm"] else row["arm"]
                values[arm][100 * float(row["share"])].append(float(row["kl"]))
                if arm == "rkv":
                    names[100 * float(row["share"])] = f"{row['budget']} tokens"
    figure, axes = plt.subplots(figsize=(9, 5))
    axes.set_prop_cycle(cycler(linestyle=["-", "--"]) * plt.rcParams["axes.prop_cycle"])
    for arm, budgets in sorted(values.items(), key=lambda item: item[1][min(item[1])]):
        if "kind=" in arm:
            continue
        sizes = sorted(budgets)
        means = [sum(budgets[b]) / len(budgets[b]) for b in sizes]
        ends = [bootstrap_ratio(budgets[b], [1.0] * len(budgets[b])) for b in sizes]
        errors = [
            [max(mean - low, 0) for mean, (low, _) in zip(means, ends, strict=True)],
            [max(high - mean, 0) for mean, (_, high) in zip(means, ends, strict=True)],
        ]
        width = 2.5 if arm in ("best", "best-bytes") else 1.0
        axes.errorbar(sizes, means, errors, label=arm, capsize=3, linewidth=width, marker="o")
    label = "KV bytes after a compression, % of the 16-bit full cache at the texts' mean length"
    axes.set(xscale="log", yscale="log", xlabel=label)
    axes.set_ylabel("KL(full || compressed), nats per token")
    axes.set_xticks(list(names), [f"{share:.1f} %\n{name}" for share, name in names.items()])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(out / "fidelity.svg", metadata={"Date": None})


def budgets(path: str, out: Path, budget: int = 128) -> None:
    """Tokens of every head at one budget."""
    profile = load_costs(path)
    curves = torch.tensor(profile.curves(), dtype=torch.float64).flatten(0, 1)
    total = budget * len(curves)
    plan = minimise(curves, torch.tensor(profile.budgets).double(), total, 16, 6 * budget)
    grid = plan.view(profile.layers, profile.kv_heads).T
    figure, axes = plt.subplots(figsize=(9, 2.2))
    image = axes.imshow(grid, aspect="auto", cmap="viridis")
    axes.set(xlabel="layer", ylabel="KV head", title=f"tokens of each head, mean {budget}")
    axes.set_yticks(range(profile.kv_heads))
    figure.colorbar(image)
    figure.tight_layout()
    figure.savefig(out / "head-budgets.svg", metadata={"Date": None})


def main() -> None:
    """Write both plots."""
    *results, costs, folder = sys.argv[1:]
    fidelity(results, Path(folder))
    budgets(costs, Path(folder))


if __name__ == "__main__":
    main()
