"""The demo on the boxed reasoner: accuracy, bytes and speed of every arm at several budgets."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import typer

from reasonalloc.cli import output
from reasonalloc.cli.watch import Watcher
from reasonalloc.errors import UsageError
from reasonalloc.evaluation import demo as boxed
from reasonalloc.evaluation.threads import idle_cores
from reasonalloc.files import check_writable
from reasonalloc.report.demo import (
    COLUMNS,
    Row,
    page_data,
    rank_arms,
    report_data,
    table_cells,
    verdict,
)
from reasonalloc.report.page import render, require_report, write

DEFAULT_PAGE = "reasonalloc-demo.html"


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
        data = report_data(run, rows, idle_cores(run.plan.workers))
        output.print_json({**data, "seconds": round(seconds, 1), "page": str(target)})
    else:
        _print_table(run.plan, rows, target, seconds)
    if len(rows) < len(run.plan.jobs):
        why = "interrupted" if run.interrupted else "the time was up"
        done = f"{len(rows)} of {len(run.plan.jobs)} runs were finished"
        output.note(f"{why}: {done}; they are in the table and on the page")
    if run.interrupted:
        raise typer.Exit(130)


def _print_table(plan: boxed.DemoPlan, rows: Sequence[Row], page: Path, seconds: float) -> None:
    """The rows, grouped by budget, and what they say."""
    console = output.stdout()
    console.print()
    title = (
        f"Boxed reasoner, {plan.count} unseen chain problems with {plan.variables} variables, "
        f"greedy, compressed every {plan.settings.interval} tokens"
    )
    green = {"best": "[green]best[/green]"}
    cells = [(*row, green.get(mark, mark)) for *row, mark in table_cells(rows)]
    console.print(output.grid(COLUMNS, cells, title))
    console.print()
    for sentence in verdict(rows):
        console.print(sentence)
    console.print(
        f"95 %: Wilson intervals, n = {plan.count}. KV bytes are measured at their most. tok/s is "
        f"of the whole batch on one core. {seconds:.0f} s in all.",
        style="dim",
    )
    console.print(f"Page: {page}", soft_wrap=True, markup=False)
