"""One self-contained HTML page of a profile file."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from reasonalloc.costs import CostProfile
from reasonalloc.profiles import Profile
from reasonalloc.report.curves import AnyProfile, layer_costs


def render_profile(profile: AnyProfile) -> str:
    """The page's HTML; the plot library is inside, nothing is loaded."""
    import plotly.graph_objects as go

    figure = go.Figure()
    if isinstance(profile, CostProfile):
        _costs(figure, profile)
    else:
        _demand(figure, profile)
    figure.update_layout(template="plotly_white", height=720)
    figure.update_layout(legend_orientation="h", legend_y=-0.15)
    page: str = figure.to_html(include_plotlyjs=True, config={"displaylogo": False})
    head = f'<!doctype html><html lang="en"><head><title>{escape(profile.model_id)}</title>'
    return re.sub(r"<html>\s*<head>", lambda _: head, page, count=1)


def _demand(figure: Any, profile: Profile) -> None:
    for index, curve in enumerate(profile.curves):
        figure.add_scatter(
            y=curve, name=f"prompt {index + 1}", line={"width": 1}, opacity=0.4, mode="lines"
        )
    figure.add_scatter(y=profile.demand_max, name="largest head", line={"dash": "dot"})
    figure.add_scatter(y=profile.demand_mean, name="mean over heads", line={"width": 3})
    figure.update_layout(
        title=f"{escape(profile.model_id)}<br>Tokens for {profile.rho:.0%} of the attention mass",
        xaxis_title="layer",
        yaxis_title="tokens",
    )


def _costs(figure: Any, profile: CostProfile) -> None:
    """A map of heads and a line over layers per budget; buttons choose the budget of the map."""
    curves = profile.curves()
    count = len(profile.budgets)
    for point in range(count):
        figure.add_heatmap(
            z=[
                [1000 * curves[layer][head][point] for layer in range(profile.layers)]
                for head in range(profile.kv_heads)
            ],
            y=[str(head) for head in range(profile.kv_heads)],
            visible=point == 0,
            colorscale="Viridis",
            colorbar={"title": {"text": "1/1000 nat"}, "len": 0.4, "y": 0.8},
            yaxis="y2",
            hovertemplate="layer %{x}, head %{y}: %{z:.3f}<extra></extra>",
        )
    for budget in profile.budgets:
        costs = [1000 * cost for cost in layer_costs(profile, budget)]
        figure.add_scatter(y=costs, name=f"budget {budget}", mode="lines+markers")
    buttons = [
        {
            "label": f"heads at budget {budget}",
            "method": "restyle",
            "args": [{"visible": [i == point for i in range(count)]}, list(range(count))],
        }
        for point, budget in enumerate(profile.budgets)
    ]
    figure.update_layout(
        title=f"{escape(profile.model_id)}<br>KL per token when one head is held to a budget "
        f"({profile.objective}, {escape(profile.policy)})",
        xaxis_title="layer",
        yaxis={"domain": [0, 0.5], "title": {"text": "1/1000 nat, sum over heads"}},
        yaxis2={"domain": [0.64, 1], "title": {"text": "KV head"}, "type": "category"},
        updatemenus=[
            {"buttons": buttons, "x": 1, "xanchor": "right", "y": 0.57, "yanchor": "middle"}
        ],
    )
