"""What the boxed demo prints: a table, or one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonalloc.cli import output
from reasonalloc.evaluation.summary import Row, verdict
from reasonalloc.evaluation.workers import idle_cores

if TYPE_CHECKING:
    from reasonalloc.cli.demo_boxed import Plan

_NUMBERS = ("budget", "right", "accuracy", "95 %", "KV/seq", "tok/s")
_TITLES = ("budget", "arm", "right", "accuracy", "95 %", "KV/seq", "tok/s", "")


def report_data(
    plan: Plan, rows: Sequence[Row], page: Path, interrupted: bool, seconds: float
) -> dict[str, Any]:
    """The result for ``--json``; sizes in bytes, times in seconds."""
    return {
        "model": "boxed reasoner",
        "task": "chain",
        "split": "test",
        "variables": plan.variables,
        "problems": plan.count,
        "interval": plan.settings.interval,
        "window": plan.settings.window,
        "results": [row.data() for row in rows],
        "verdict": verdict(rows),
        "left_out": plan.left_out,
        "missing_runs": len(plan.jobs) - len(rows),
        "interrupted": interrupted,
        "workers": idle_cores(plan.workers),
        "seconds": round(seconds, 1),
        "page": str(page),
    }


def print_table(plan: Plan, rows: Sequence[Row], page: Path, seconds: float) -> None:
    """The rows, grouped by budget, and what they say."""
    cells: list[tuple[str, ...]] = []
    for index, row in enumerate(rows):
        again = index > 0 and rows[index - 1].budget == row.budget
        if index and not again:
            cells.append(("",) * len(_TITLES))
        cells.append(_cells(row, again))
    console = output.stdout()
    console.print()
    title = (
        f"Boxed reasoner, {plan.count} unseen chain problems with {plan.variables} variables, "
        f"greedy, compressed every {plan.settings.interval} tokens"
    )
    console.print(output.grid([(name, name in _NUMBERS) for name in _TITLES], cells, title))
    console.print()
    for sentence in verdict(rows):
        console.print(sentence)
    console.print(
        f"95 %: Wilson intervals, n = {plan.count}. KV bytes are measured at their most. tok/s is "
        f"of the whole batch on one core. {seconds:.0f} s in all.",
        style="dim",
    )
    console.print(f"Page: {page}", soft_wrap=True, markup=False)


def _cells(row: Row, again: bool) -> tuple[str, ...]:
    mark = "[green]best[/green]" if row.best else ""
    if row.idle:
        mark = "never compressed"
    return (
        "" if again else str(row.budget or "-"),
        "full cache" if row.budget is None else row.arm,
        f"{row.correct} of {row.n}",
        f"{100 * row.accuracy:.0f} %",
        f"{100 * row.low:.0f}-{100 * row.high:.0f} %",
        output.human(row.kv_bytes),
        f"{row.tokens_per_second:.0f}",
        mark,
    )
