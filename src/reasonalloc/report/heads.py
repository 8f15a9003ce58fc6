"""Head budgets over time, from the events of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reasonalloc.errors import UsageError
from reasonalloc.evaluation.samples import load_events
from reasonalloc.sizes import read_budget

#: Boundaries of one run that a picture shows, evenly spaced, and runs per page section.
BOUNDARIES, RUNS = 64, 24


def head_budgets(
    folders: Sequence[Path], arms: Sequence[str], budgets: Sequence[int | str]
) -> dict[str, Any] | None:
    """Tokens that each KV head kept at each compression; None if nothing was recorded.

    Args:
        folders: of the runs.
        arms, budgets: those that are shown, in their order.

    Returns:
        ``runs``: per (arm, budget) the first recorded problem, with ``tokens`` [boundaries],
        ``layers`` and ``budgets`` [boundaries][layers][heads] (null where a layer was not
        compressed); ``boundaries`` in all; ``left_out``: runs that are not shown.
    """
    events: dict[tuple[str, int | str], dict[int, dict[int, list[int]]]] = {}
    named: dict[tuple[str, int | str], tuple[str, int]] = {}
    for folder in folders:
        for row in load_events(folder):
            try:
                key = (str(row["arm"]), read_budget(row["budget"]))
                run = (str(row["problem"]), int(row["sample"]))
                place = (int(row["tokens"]), int(row["layer"]))
                kept = [int(n) for n in row["budgets"]]
            except (KeyError, TypeError, ValueError, UsageError):
                continue  # as load_events: a damaged line costs a picture only
            if key[0] in arms and key[1] in budgets and named.setdefault(key, run) == run:
                events.setdefault(key, {}).setdefault(place[0], {})[place[1]] = kept
    if not events:
        return None
    keys = sorted(events, key=lambda key: (arms.index(key[0]), budgets.index(key[1])))
    return {
        "runs": [_run(key, named[key], events[key]) for key in keys[:RUNS]],
        "left_out": max(0, len(keys) - RUNS),
    }


def _run(
    key: tuple[str, int | str], run: tuple[str, int], events: dict[int, dict[int, list[int]]]
) -> dict[str, Any]:
    steps = sorted(events)
    shown = steps
    if len(steps) > BOUNDARIES:
        shown = [steps[i * (len(steps) - 1) // (BOUNDARIES - 1)] for i in range(BOUNDARIES)]
    layers = sorted({layer for step in steps for layer in events[step]})
    return {
        "arm": key[0],
        "budget": key[1],
        "problem": run[0],
        "sample": run[1],
        "tokens": shown,
        "layers": layers,
        "budgets": [[events[step].get(layer) for layer in layers] for step in shown],
        "boundaries": len(steps),
    }
