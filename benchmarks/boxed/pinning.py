"""What pinning the prompt is worth: arms with the prompt on top of the budget, and competing.

    python benchmarks/boxed/pinning.py PINNED EVICTED

Two folders of ``reasonalloc eval`` on the same problems, one with ``--prompt pin``. Prints, as
Markdown, the share of problems that every arm solves with pinned prompts, what it gains over
``random``, paired; then the same arm at equal bytes with its prompt competing: there the budget is
larger by the tokens of the prompt.
"""

from __future__ import annotations

import sys
from collections import defaultdict

from reasonalloc.config import preset_name
from reasonalloc.evaluation.intervals import mean_interval
from reasonalloc.evaluation.paired import compare
from reasonalloc.evaluation.samples import Sample, load_groups

Runs = dict[tuple[str, int], list[Sample]]


def runs(folder: str) -> Runs:
    """Samples of each arm at each budget."""
    found: Runs = defaultdict(list)
    (group,) = load_groups([folder])
    for sample in group.samples:
        if isinstance(sample.budget, int):
            found[_name(sample.arm), sample.budget].append(sample)
    return found


def _name(arm: str) -> str:
    return "reasonalloc" if "/profile(" in arm else preset_name(arm)


def share(samples: list[Sample]) -> str:
    """Per cent of problems solved, with its 95 % interval."""
    shares = [float(sample.correct) for sample in samples]
    low, high = mean_interval(shares, len(shares))
    return f"{100 * sum(shares) / len(shares):.0f} % ({100 * low:.0f}-{100 * high:.0f})"


def gain(arm: list[Sample], base: list[Sample]) -> str:
    """Points that an arm solves more, paired by problem, with the 95 % interval."""
    paired = compare(arm, base)
    assert paired is not None
    gap = paired.difference
    return f"{100 * gap.value:+.0f} ({100 * gap.low:+.0f} to {100 * gap.high:+.0f})"


def row(*cells: object) -> None:
    """Print a line of a table."""
    print("| " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    """Print both tables."""
    pinned, evicted = map(runs, sys.argv[1:])
    arms = list(dict.fromkeys(arm for arm, _ in pinned))
    budgets = sorted({budget for _, budget in pinned})
    prompt = {sample.prompt_tokens for samples in pinned.values() for sample in samples}
    print(f"{len(pinned[arms[0], budgets[0]])} problems, prompts of {min(prompt)}-{max(prompt)}.\n")
    row("arm", *(f"{budget}, less `random`" for budget in budgets))
    row(*["---"] * (1 + len(budgets)))
    for arm in arms:
        cells = []
        for budget in budgets:
            own = pinned[arm, budget]
            more = "" if arm == "random" else f", {gain(own, pinned['random', budget])}"
            cells.append(share(own) + more)
        row(f"`{arm}`", *cells)
    print()
    row("arm", "pinned", "competing", "KV bytes", "solved pinned", "competing", "difference")
    row(*["---"] * 7)
    for arm, budget in pinned:
        for other, total in evicted:
            if other == arm and total == budget + max(prompt):
                own, base = pinned[arm, budget], evicted[arm, total]
                sizes = {sample.kv_bytes for sample in (*own, *base)}
                size = f"{min(sizes):,}-{max(sizes):,}" if len(sizes) > 1 else f"{min(sizes):,}"
                row(f"`{arm}`", budget, total, size, share(own), share(base), gain(own, base))


if __name__ == "__main__":
    main()
