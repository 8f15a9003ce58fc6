"""Accuracy against memory on the demo's problems; needs matplotlib.

    reasonalloc demo --json > demo.json
    python benchmarks/demo/plot.py demo.json docs/images

``results.json`` is the table of the run in docs/evidence.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "reasonalloc"
from matplotlib import pyplot as plt  # noqa: E402

BYTES = "kv_bytes_per_sequence"
ARMS = ("best", "rkv", "reasonalloc", "snapkv", "h2o", "random")


def plot(rows: list[dict[str, Any]], out: Path) -> None:
    """Draw a line per arm, with 95 % intervals, and the full cache as a level."""
    figure, axes = plt.subplots(figsize=(8, 4.2))
    full = next(row for row in rows if row["arm"] == "full")
    axes.axhline(100 * full["accuracy"], color="0.5", linestyle=":", label="full cache")
    for arm in ARMS:
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["budget"])
        share = [100 * row[BYTES] / full[BYTES] for row in own]
        right = [100 * row["accuracy"] for row in own]
        low = [100 * (row["accuracy"] - row["interval95"][0]) for row in own]
        high = [100 * (row["interval95"][1] - row["accuracy"]) for row in own]
        errors = [[max(x, 0) for x in low], [max(x, 0) for x in high]]
        width = 2.5 if arm == "best" else 1.2
        axes.errorbar(share, right, errors, label=arm, capsize=3, linewidth=width, marker="o")
    axes.set_xlabel("KV cache of a sequence, % of the full cache's bytes")
    axes.set_ylabel("problems solved, %")
    axes.set_ylim(-3, 105)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(out / "accuracy-memory.svg", metadata={"Date": None})


def main() -> None:
    """Read what the demo printed, and draw it."""
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    plot(json.loads(source.read_text("utf-8"))["results"], out)


if __name__ == "__main__":
    main()
