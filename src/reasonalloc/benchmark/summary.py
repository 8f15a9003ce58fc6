"""What the runs of a benchmark say, arm by arm."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from reasonalloc.benchmark.decode import quartiles
from reasonalloc.tables import Column, Table, human

#: Shares of a step's time.
PARTS = ("attention", "compression", "rest")
LEGEND = (
    "tok/s: over the whole decode; ms@N: mean of the interval that ends at N new tokens, its "
    "compression included; quartiles: of all steps (ms); attn, compr, rest: attention, "
    "compression and the rest of one more interval at the end, timed one by one (a replayed "
    "step's attention is in the rest)."
)


def summarise(data: dict[str, Any], points: Sequence[int]) -> list[dict[str, Any]]:
    """Return medians over the runs, per batch size and arm.

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
    for batch in data["batches"]:
        names = dict.fromkeys(run["arm"] for run in batch["runs"])
        if not names:
            continue
        arms = [_arm(name, batch, data["interval"], points) for name in names]
        products = statistics.median(batch["weight_products"])
        entries.append({"batch": batch["batch"], "weight_products": products, "arms": arms})
    return entries


def _arm(name: str, batch: dict[str, Any], interval: int, points: Sequence[int]) -> dict[str, Any]:
    runs = [run for run in batch["runs"] if run["arm"] == name]
    whole = [run for run in runs if not run.get("out_of_memory")]
    if not whole:
        return {"arm": name, "out_of_memory": True}

    def middle(values: Sequence[float]) -> float:
        return statistics.median(values)

    return {
        "arm": name,
        "runs": len(whole),
        "tokens_per_second": middle(
            [batch["batch"] * len(run["steps"]) / sum(run["steps"]) for run in whole]
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


def bench_table(model: str, entry: dict[str, Any], points: Sequence[int]) -> Table:
    """Return a row per arm.

    Args:
        model: its name.
        entry: of ``summarise``.
        points: as for ``summarise``.
    """
    rows = []
    for arm in entry["arms"]:
        if arm.get("out_of_memory"):
            rows.append([arm["arm"], "out of memory", *[""] * (len(points) + 5)])
            continue
        rows.append(
            [
                arm["arm"],
                f"{arm['tokens_per_second']:.1f}",
                *(f"{1e3 * arm['step_seconds'][str(p)]:.1f}" for p in points),
                f"{1e3 * arm['quartiles'][0]:.1f}-{1e3 * arm['quartiles'][2]:.1f}",
                *("-" if arm[part] is None else f"{100 * arm[part]:.1f} %" for part in PARTS),
                human(arm["kv_bytes"]),
            ]
        )
    title = (
        f"{model}, batch {entry['batch']}: weight products alone "
        f"{1e3 * entry['weight_products']:.1f} ms"
    )
    columns: list[Column] = [("arm", False), ("tok/s", True), *((f"ms@{p}", True) for p in points)]
    columns += [(part, True) for part in ("quartiles", "attn", "compr", "rest", "KV")]
    return Table(title, columns, rows)
