"""The data of the boxed demo's page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from reasonalloc.calibrated.demand import load_profile
from reasonalloc.evaluation.arms import ArmResult
from reasonalloc.evaluation.summary import Row, verdict
from reasonalloc.report.trace import telling_problem, trace
from reasonalloc.version import __version__

if TYPE_CHECKING:
    from reasonalloc.cli.demo_boxed import Plan


def page_data(
    plan: Plan, results: Sequence[ArmResult], rows: Sequence[Row], tokenizer: Any
) -> dict[str, Any]:
    """Everything that the page shows, as plain JSON data."""
    problem = plan.problems(1)[0]
    return {
        "version": __version__,
        "count": plan.count,
        "variables": plan.variables,
        "interval": plan.settings.interval,
        "window": plan.settings.window,
        "prompt_tokens": len(results[0].prompts[0]),
        "chain_tokens": problem.solution_tokens,
        "arms": [arm for arm in plan.arms if any(row.arm == arm for row in rows)],
        "budgets": sorted({row.budget for row in rows if row.budget is not None}),
        "rows": [row.data() for row in rows],
        "verdict": verdict(rows),
        "missing": len(plan.jobs) - len(results),
        "left_out": plan.left_out,
        "profile": _profile(plan),
        "chain": _chain(plan, results, tokenizer),
    }


def _profile(plan: Plan) -> dict[str, Any] | None:
    if plan.profile is None:
        return None
    profile = load_profile(plan.profile)
    return {
        "rho": profile.rho,
        "steps": profile.steps,
        "prompts": len(profile.curves),
        "mean": profile.demand_mean,
        "max": profile.demand_max,
        "low": [min(curve[i] for curve in profile.curves) for i in range(len(profile.demand_mean))],
        "high": [
            max(curve[i] for curve in profile.curves) for i in range(len(profile.demand_mean))
        ],
    }


def _chain(plan: Plan, results: Sequence[ArmResult], tokenizer: Any) -> dict[str, Any] | None:
    """The traced arms on the problem on which they disagree most; None if none was recorded."""
    traced = [result for result in results if result.events]
    if not traced:
        return None
    index = telling_problem(traced)
    problem = plan.problems()[index]
    kv_heads = int(traced[0].events[0].budgets.shape[1])
    layers = 1 + max(event.layer for result in traced for event in result.events)
    arms = []
    for result in traced:
        ids = [*result.prompts[index], *result.completions[index]]
        words = tokenizer.convert_ids_to_tokens(ids)
        arms.append(trace(result, index, problem, words, layers, kv_heads))
    return {
        "budget": traced[0].job.budget,
        "problem": index,
        "answer": problem.answer,
        "right": sum(result.correct[index] for result in traced),
        "arms": arms,
    }
