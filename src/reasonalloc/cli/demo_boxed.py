"""The demo on the boxed reasoner: accuracy, bytes and speed of every arm at several budgets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from reasonalloc.cli import output
from reasonalloc.cli.watch import Watcher
from reasonalloc.errors import UsageError
from reasonalloc.evaluation import demo as boxed
from reasonalloc.evaluation.threads import idle_cores
from reasonalloc.report.demo import Row, page_data, rank_arms, verdict
from reasonalloc.report.page import check_writable, render, require_report, write

DEFAULT_PAGE = "reasonalloc-demo.html"
_NUMBERS = ("budget", "right", "accuracy", "95 %", "KV/seq", "tok/s")
_TITLES = ("budget", "arm", "right", "accuracy", "95 %", "KV/seq", "tok/s", "")


def demo(
    as_json: bool = False,
    out: str = DEFAULT_PAGE,
    count: int | None = None,
    folder: Path | None = None,
) -> None:
    """Run every arm, print the table, write the page.

    Args:
        as_json: one JSON object on stdout instead of the table.
        out: file of the page.
        count: problems per arm and budget; None: as many as fit into the time.
        folder: another checkpoint of the boxed model.
    """
    began = time.monotonic()
    require_report()
    target = check_writable(out)
    if count is not None and count < 1:
        raise UsageError(f"--problems {count}: give at least 1")
    plan = boxed.make_plan(folder or boxed.boxed_folder(), count or boxed.MOST)
    if plan.left_out:
        output.note(plan.left_out)
    until = began + boxed.LIMIT if count is None else None
    run = boxed.run_demo(plan, Watcher(), fit=count is None, until=until)
    rows = rank_arms(run.samples)
    write(target, render(page_data(run.plan, run.samples, run.recordings, run.tokenizer)))
    seconds = time.monotonic() - began
    if as_json:
        output.print_json(_data(run, rows, target, seconds))
    else:
        _print_table(run.plan, rows, target, seconds)
    if len(rows) < len(run.plan.jobs):
        why = "interrupted" if run.interrupted else "the time was up"
        done = f"{len(rows)} of {len(run.plan.jobs)} runs were finished"
        output.note(f"{why}: {done}; they are in the table and on the page")
    if run.interrupted:
        raise typer.Exit(130)


def _data(run: boxed.DemoRun, rows: Sequence[Row], page: Path, seconds: float) -> dict[str, Any]:
    """The result for ``--json``; sizes in bytes, times in seconds."""
    plan = run.plan
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
        "interrupted": run.interrupted,
        "workers": idle_cores(plan.workers),
        "seconds": round(seconds, 1),
        "page": str(page),
    }


def _print_table(plan: boxed.DemoPlan, rows: Sequence[Row], page: Path, seconds: float) -> None:
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
