"""``reasonalloc profile``: what profile files say, how far apart and how stable they are."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.markup import escape

from reasonalloc.calibrated.costs import CostProfile
from reasonalloc.calibrated.demand import DemandProfile
from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.cli.profile_tables import (
    cost_table,
    demand_table,
    divided,
    held_table,
    joint_table,
    number,
    side_by_side,
    spaced,
)
from reasonalloc.errors import UsageError

if TYPE_CHECKING:
    from reasonalloc.report.curves import AnyProfile

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
    from reasonalloc.report.curves import load_any

    profile = load_any(file)
    if plot is not None:
        from reasonalloc.report.page import check_writable, require_report

        require_report()
        target = check_writable(plot, "--plot")
    if isinstance(profile, CostProfile):
        used = [measured_budget(profile, b) for b in budget] if budget else spaced(profile.budgets)
        columns, rows = cost_table(profile, used, heads)
        title = (
            f"KL per token when one head is held to a budget: {escape(profile.model_id)}, "
            f"{profile.objective}, {profile.policy}, texts: {len(profile.tokens)}"
        )
        data: dict[str, Any] = {"budgets": profile.budgets, "costs": profile.curves()}
        data |= {"objective": profile.objective, "policy": profile.policy, "joint": profile.joint}
    else:
        if heads:
            raise UsageError("--heads: an attention-mass profile has no heads: leave it out")
        budgets = {size: divided(file, profile, size) for size in budget or []}
        columns, rows = demand_table(profile, budgets)
        title = (
            f"Tokens for {profile.rho:.0%} of the attention mass: {escape(profile.model_id)}, "
            f"prompts: {len(profile.curves)}"
        )
        data = {"demand_mean": profile.demand_mean, "demand_max": profile.demand_max}
        data |= {"objective": profile.objective, "budgets": budgets}
    if plot is not None:
        from reasonalloc.report.page import write
        from reasonalloc.report.profile_page import render_profile

        write(target, render_profile(profile), "--plot")
    if as_json:
        output.print_json({"profile": file, "model": profile.model_id, **data})
        return
    output.stdout().print(f"[bold]{title}[/]")  # as a table's title it would be folded
    output.stdout().print(output.grid(columns, rows, ""))
    if isinstance(profile, CostProfile):
        if profile.joint:
            output.stdout().print(output.grid(*joint_table([profile]), "All heads at once"))
        if left := [str(size) for size in profile.budgets if size not in used]:
            output.stdout().print(f"Also measured at {', '.join(left)}: see --budget.")
        output.stdout().print("Costs in 1/1000 nat per token; of a layer: summed over its heads.")
    if plot is not None:
        output.stdout().print(f"Plots written to {target}")


@app.command()
def compare(first: First, second: Second, budget: Measured = None, as_json: o.Json = False) -> None:
    """Earth Mover's Distance over relative depth, and rank correlation, of two profiles."""
    from reasonalloc.report import curves

    curves.require_scipy()
    pair = [curves.load_any(first), curves.load_any(second)]
    one, two = pair
    at, heads = None, None
    if isinstance(one, CostProfile) and isinstance(two, CostProfile):
        at = _common_budget(one, two, budget)
        lines = [curves.layer_costs(one, at), curves.layer_costs(two, at)]
        if (one.layers, one.kv_heads) == (two.layers, two.kv_heads):
            heads = curves.rank_correlation(curves.head_costs(one, at), curves.head_costs(two, at))
    elif isinstance(one, DemandProfile) and isinstance(two, DemandProfile):
        _no_budget(budget)
        lines = [one.demand_mean, two.demand_mean]
    else:
        kinds = ["costs" if isinstance(p, CostProfile) else "attention mass" for p in pair]
        raise UsageError(
            f"{first!r} holds {kinds[0]} and {second!r} {kinds[1]}: compare files of one kind"
        )
    emd, rank = curves.distance(*lines), curves.rank_correlation(*lines)
    notes = _differences(one, two)
    if as_json:
        output.print_json(
            {
                "files": [first, second],
                "models": [one.model_id, two.model_id],
                "budget": at,
                "emd": emd,
                "rank_correlation": rank,
                "head_rank_correlation": heads,
                "curves": lines,
                "differences": notes,
            }
        )
        return
    what = "Demand" if at is None else f"Cost at budget {at}"
    output.stdout().print(output.grid(*side_by_side(lines, at), f"{what} of each layer"))
    output.stdout().print(
        f"Earth Mover's Distance {number(emd)} of the depth; rank correlation of layers "
        f"{number(rank)}" + (f", of heads {number(heads)}" if at is not None else "")
    )
    for text in notes:
        output.note(text)


@app.command()
def stability(file: File, budget: Measured = None, as_json: o.Json = False) -> None:
    """Each text against the others: is the curve a property of the architecture?"""
    from reasonalloc.report import curves

    curves.require_scipy()
    profile = curves.load_any(file)
    if isinstance(profile, CostProfile):
        at = profile.budgets[0] if budget is None else measured_budget(profile, budget)
        count = len(profile.tokens)
    else:
        _no_budget(budget)
        at, count = 0, len(profile.curves)
    if count < 2:
        raise UsageError(f"{file!r} has one text alone: calibrate with at least two")
    texts, kinds = curves.by_text(profile, at), curves.by_kind(profile, at)
    answer = curves.answer(texts, kinds)
    summary = {
        name: {
            measure: asdict(curves.spread([getattr(held, measure) for held in group]))
            for measure in ("emd", "rank", "head_rank")
        }
        for name, group in (("texts", texts), ("kinds", kinds))
    }
    if as_json:
        output.print_json(
            {
                "profile": file,
                "budget": at or None,
                "answer": answer,
                "summary": summary,
                "texts": [asdict(held) for held in texts],
                "kinds": [asdict(held) for held in kinds],
            }
        )
        return
    where = f" at budget {at}" if at else ""
    for name, group in (("text", texts), ("kind", kinds)):
        if group:
            columns, rows = held_table(name, group, summary[f"{name}s"])
            output.stdout().print(
                output.grid(columns, rows, f"Each {name} against the others{where}")
            )
    output.stdout().print(answer)


def measured_budget(profile: CostProfile, budget: int) -> int:
    """The budget, if costs were measured at it.

    Raises:
        UsageError: they were not; says at which.
    """
    if budget not in profile.budgets:
        raise UsageError(f"--budget={budget} was not measured: choose from {_some(profile)}")
    return budget


def _some(profile: CostProfile) -> str:
    return ", ".join(map(str, profile.budgets))


def _common_budget(one: CostProfile, two: CostProfile, budget: int | None) -> int:
    common = [size for size in one.budgets if size in two.budgets]
    if budget is None and common:
        return common[0]
    if budget in common:
        return budget
    what = "no budget is in both files" if not common else f"--budget={budget} is not in both files"
    raise UsageError(
        f"{what}: A was measured at {_some(one)}, B at {_some(two)}: "
        + ("choose one of " + ", ".join(map(str, common)) if common else "calibrate one again")
    )


def _no_budget(budget: int | None) -> None:
    if budget is not None:
        raise UsageError(f"--budget={budget} has no effect with attention mass: leave it out")


def _differences(one: AnyProfile, two: AnyProfile) -> list[str]:
    """How two files were made differently."""
    names = ("model_id", "rho", "objective", "policy", "interval", "window")
    found = []
    for name in names:
        values = [getattr(profile, name, None) for profile in (one, two)]
        if values[0] != values[1]:
            found.append(f"{name} differs: {values[0]!r} and {values[1]!r}")
    if _layers(one) != _layers(two):
        found.append("layer counts differ, so ranks compare the longer curve at the other's depths")
    return found


def _layers(profile: AnyProfile) -> int:
    return profile.layers if isinstance(profile, CostProfile) else len(profile.demand_mean)
