"""``reasonalloc profile``: what calibrated files say, how far apart and how stable they are."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.errors import UsageError

if TYPE_CHECKING:
    from reasonalloc.calibrated import CostProfile, DemandProfile
    from reasonalloc.tables import Table

app = typer.Typer(no_args_is_help=True, help="Look at calibrated profiles, compare them.")

File = Annotated[str, typer.Argument(metavar="FILE", help="Profile of 'reasonalloc calibrate'.")]
First = Annotated[str, typer.Argument(metavar="A", help="A profile.")]
Second = Annotated[str, typer.Argument(metavar="B", help="Another of the same kind.")]
Measured = Annotated[
    Optional[int],  # noqa: UP045 (typer 0.16 on Python 3.10)
    typer.Option(
        "--budget", help="Of cost profiles: a measured budget. Default: the smallest one."
    ),
]
Budgets = Annotated[
    Optional[list[int]],  # noqa: UP045
    typer.Option(
        "--budget",
        help="May be repeated. Of costs: measured budgets to show. Of attention mass: budgets to "
        "divide among the layers.",
    ),
]
Heads = Annotated[bool, typer.Option("--heads", help="Of cost profiles: a row for every head.")]
Plot = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--plot", metavar="PAGE.html", help="Write a self-contained page with plots."),
]


@app.command()
def show(
    file: File,
    budget: Budgets = None,
    heads: Heads = False,
    plot: Plot = None,
    as_json: o.Json = False,
) -> None:
    """Demand of each layer, or what holding a head to a budget costs."""
    from reasonalloc.calibrated import open_calibrated

    made: Any = open_calibrated(file)
    target = None if plot is None else _check_plot(plot, made.kind, file)
    if made.kind == "cost":
        tables, notes, data = _costs(made, budget, heads)
    elif heads:
        kind = {"demand": "an attention-mass profile has"}.get(made.kind, "statistics have")
        raise UsageError(f"--heads: {kind} no heads: leave it out")
    elif made.kind == "demand":
        tables, notes, data = _demand(file, made, budget or [])
    elif budget:
        raise UsageError("--budget has no effect with statistics: leave it out")
    else:
        tables, notes, data = made.tables(), made.notes(), made.summary()
    if target is not None:
        from reasonalloc.report.page import write
        from reasonalloc.report.profile_page import render_profile

        write(target, render_profile(made), "--plot")
    if as_json:
        output.print_json({"profile": file, "model": made.model_id, **data})
        return
    from reasonalloc import tables as t

    t.show(tables, made.heading(), notes)
    if target is not None:
        output.stdout().print(f"Plots written to {target}")


def _check_plot(plot: str, kind: str, file: str) -> Path:
    from reasonalloc.files import check_not_read, check_writable
    from reasonalloc.report.page import require_report

    if kind == "statistics":
        raise UsageError("--plot: statistics have no page: leave it out")
    require_report()
    check_not_read("--plot", plot, [file])
    return check_writable(plot, "--plot")


def _costs(
    profile: CostProfile, budgets: list[int] | None, heads: bool
) -> tuple[list[Table], list[str], dict[str, Any]]:
    from reasonalloc.calibrated.costs import joint_table
    from reasonalloc.calibrated.tables import spaced
    from reasonalloc.report.profiles import measured_budget

    used = [measured_budget(profile, b) for b in budgets] if budgets else spaced(profile.budgets)
    tables = [profile.cost_table(used, heads)]
    if profile.joint:
        tables.append(joint_table([profile]))
    data: dict[str, Any] = {"budgets": profile.budgets, "costs": profile.curves()}
    data |= {"objective": profile.objective, "policy": profile.policy, "joint": profile.joint}
    return tables, profile.table_notes(used, ": see --budget"), data


def _demand(
    file: str, profile: DemandProfile, sizes: list[int]
) -> tuple[list[Table], list[str], dict[str, Any]]:
    from reasonalloc.report.profiles import divided

    budgets = {size: divided(file, profile, size) for size in sizes}
    data = {"demand_mean": profile.demand_mean, "demand_max": profile.demand_max}
    return (
        [profile.demand_table(budgets)],
        [],
        {
            **data,
            "objective": profile.objective,
            "window": profile.window,
            "keys": profile.keys,
            "budgets": budgets,
        },
    )


@app.command()
def compare(first: First, second: Second, budget: Measured = None, as_json: o.Json = False) -> None:
    """Earth Mover's Distance over relative depth, and rank correlation, of two profiles."""
    from reasonalloc.report import profiles

    comparison = profiles.compare(first, second, budget)
    if as_json:
        output.print_json(asdict(comparison))
        return
    comparison.show()
    for text in comparison.differences:
        output.note(text)


@app.command()
def stability(file: File, budget: Measured = None, as_json: o.Json = False) -> None:
    """Each text against the others: is the curve a property of the architecture?"""
    from reasonalloc.report import profiles

    result = profiles.stability(file, budget)
    if as_json:
        output.print_json(asdict(result))
    else:
        result.show()
