"""What the runs of ``reasonalloc bench`` say, arm by arm."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from reasonalloc.benchmark.decode import quartiles


def summarise(data: dict[str, Any], points: Sequence[int]) -> list[dict[str, Any]]:
    """Per batch size and arm: medians over the runs.

    Args:
        data: as the command writes it, with ``batches`` and ``interval``.
        points: numbers of new tokens at which the time per step is wanted.

    Returns:
        One entry per batch size: ``batch``, ``weight_products`` (seconds) and ``arms`` with
        ``tokens_per_second``, ``step_seconds`` by point, ``quartiles`` of all steps (seconds), the
        shares ``attention`` (None if it is in the rest), ``compression``, ``rest`` and
        ``kv_bytes``, ``peak_bytes``.
    """
    entries = []
    for found in data["batches"]:
        names = dict.fromkeys(run["arm"] for run in found["runs"])
        if not names:
            continue
        arms = [_arm(name, found, data["interval"], points) for name in names]
        products = statistics.median(found["weight_products"])
        entries.append({"batch": found["batch"], "weight_products": products, "arms": arms})
    return entries


def _arm(name: str, found: dict[str, Any], interval: int, points: Sequence[int]) -> dict[str, Any]:
    runs = [run for run in found["runs"] if run["arm"] == name]
    whole = [run for run in runs if not run.get("out_of_memory")]
    if not whole:
        return {"arm": name, "out_of_memory": True}

    def middle(values: Sequence[float]) -> float:
        return statistics.median(values)

    return {
        "arm": name,
        "runs": len(whole),
        "tokens_per_second": middle(
            [found["batch"] * len(run["steps"]) / sum(run["steps"]) for run in whole]
        ),
        "step_seconds": {
            str(point): middle(
                [statistics.mean(run["steps"][max(0, point - interval) : point]) for run in whole]
            )
            for point in points
        },
        "quartiles": quartiles([step for run in whole for step in run["steps"]]),
        "prefill_seconds": middle([run["prefill_seconds"] for run in whole]),
        **{
            part: None if whole[0][part] is None else middle([run[part] for run in whole])
            for part in PARTS
        },
        "kv_bytes": max(run["kv_bytes"] for run in whole),
        "peak_bytes": max(run["peak_bytes"] or 0 for run in whole) or None,
    }


#: Shares of a step's time.
PARTS = ("attention", "compression", "rest")
