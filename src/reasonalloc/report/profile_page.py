"""The page of a profile file: its data, for ``profile.html.j2``."""

from __future__ import annotations

from typing import Any

from reasonalloc.calibrated.costs import CostProfile
from reasonalloc.calibrated.demand import DemandProfile
from reasonalloc.report.curves import AnyProfile, layer_costs, wave
from reasonalloc.report.page import render

TEMPLATE = "profile.html.j2"


def render_profile(profile: AnyProfile) -> str:
    """Return the page's HTML; the plot library is inside, nothing is loaded."""
    data = _costs(profile) if isinstance(profile, CostProfile) else _demand(profile)
    return render(data, TEMPLATE)


def _demand(profile: DemandProfile) -> dict[str, Any]:
    return {
        "kind": "demand",
        "model": profile.model_id,
        "curves": profile.curves,
        **wave(profile),
    }


def _costs(profile: CostProfile) -> dict[str, Any]:
    """Return costs in 1/1000 nat per token: ``layers`` [budgets][layers], ``heads``
    [budgets][kv_heads][layers], None where a layer has fewer heads."""
    curves = profile.curves()
    points = range(len(profile.budgets))
    return {
        "kind": "costs",
        "model": profile.model_id,
        "objective": profile.objective,
        "policy": profile.policy,
        "texts": len(profile.tokens),
        "tokens": sum(profile.tokens),
        "budgets": profile.budgets,
        "layers": [[1000 * cost for cost in layer_costs(profile, b)] for b in profile.budgets],
        "heads": [
            [
                [1000 * layer[head][point] if head < len(layer) else None for layer in curves]
                for head in range(max(profile.heads))
            ]
            for point in points
        ],
    }
