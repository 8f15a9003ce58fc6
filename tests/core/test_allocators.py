"""Budgets: integers, exact sums and bounds, equal to the plain references."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import made_costs
import made_statistics
import reference
from examples import examples
from reasonalloc.allocators.head import HEAD_ALLOCATORS, HeadQuery
from reasonalloc.allocators.head.base import SCORE_NORMS
from reasonalloc.allocators.layer import LAYER_ALLOCATORS, LayerQuery
from reasonalloc.allocators.minimise import interpolate, minimise
from reasonalloc.calibrated.costs import load_costs
from reasonalloc.errors import UsageError
from reasonalloc.ops import TORCH
from reasonalloc.rotary import Rope


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], int, list[int], list[int], float]:
    n = draw(st.integers(1, 9))
    demand = draw(st.lists(st.floats(0, 1e4), min_size=n, max_size=n))
    lower = draw(st.lists(st.integers(0, 40), min_size=n, max_size=n))
    upper = [lo + draw(st.integers(0, 300)) for lo in lower]
    total = draw(st.integers(sum(lower), sum(upper)))
    return demand, total, lower, upper, draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]))


@given(st.lists(problems(), min_size=1, max_size=3))
@examples(200)
def test_robustify(batch: list[tuple[list[float], int, list[int], list[int], float]]) -> None:
    for demand, total, lower, upper, exponent in batch:
        budgets = TORCH.robustify(
            torch.tensor([demand], dtype=torch.float64),
            torch.tensor([total]),
            torch.tensor([lower]),
            torch.tensor([upper]),
            exponent,
        )[0].tolist()
        assert sum(budgets) == total
        assert all(lo <= b <= hi for lo, b, hi in zip(lower, budgets, upper, strict=True))
        slow = reference.robustify(demand, total, lower, upper, exponent)
        assert max(abs(a - b) for a, b in zip(budgets, slow, strict=True)) <= 1  # ties of 1e-6


@pytest.mark.parametrize("demand", [[1, 4, 9, 16], [5, 5, 5, 5], [0, 0, 1, 100]])
@pytest.mark.parametrize("total", [40, 41, 77, 100, 160])
def test_robustify_equals_bisection(demand: list[float], total: int) -> None:
    lower, upper = [4] * 4, [60, 30, 80, 40]
    fast = TORCH.robustify(
        torch.tensor(demand), torch.tensor(total), torch.tensor(lower), torch.tensor(upper), 0.5
    )
    assert fast.tolist() == reference.robustify(demand, total, lower, upper, 0.5)


@st.composite
def head_queries(draw: st.DrawFn) -> tuple[HeadQuery, list[list[list[float]]]]:
    batch, heads, window = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 6))
    lengths = [[draw(st.integers(0, 40)) for _ in range(heads)] for _ in range(batch)]
    layer_total = draw(st.integers(heads * window, heads * 45))
    seed = draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, heads, 40, generator=generator)
    if draw(st.booleans()):
        scores = (scores * 4).round() / 4  # many ties
    if draw(st.booleans()):
        scores[..., : draw(st.integers(1, 3))] = torch.inf  # sinks
    index = torch.arange(40)
    length = torch.tensor(lengths)
    scores = scores.masked_fill(index >= (length - window)[..., None], -torch.inf)
    rows = [
        [scores[b, h, : max(lengths[b][h] - window, 0)].tolist() for h in range(heads)]
        for b in range(batch)
    ]
    total = length.sum(1).clamp_max(layer_total)
    least = torch.full_like(total, window)
    shares = draw(st.booleans())
    planned = torch.tensor(draw(st.lists(st.integers(1, 90), min_size=heads, max_size=heads)))
    return HeadQuery(scores, length, total, layer_total, least, window, shares, planned), rows


@given(head_queries(), st.sampled_from(SCORE_NORMS))
@examples(150)
def test_head_allocators(made: tuple[HeadQuery, list[list[list[float]]]], norm: str) -> None:
    query, rows = made
    for name in HEAD_ALLOCATORS.entries():
        spec = name if name in ("uniform", "planned") else f"{name}(score_norm={norm})"
        budgets = HEAD_ALLOCATORS.create(spec).allocate(query)
        assert budgets.dtype == torch.int64
        assert torch.equal(budgets.sum(1), query.total)
        assert bool((budgets <= query.lengths).all()) and bool((budgets >= 0).all())
        for b, row in enumerate(rows):
            lengths = query.lengths[b].tolist()
            slow = reference.head_budgets(
                name,
                row,
                lengths,
                query.layer_total,
                query.window,
                query.window,
                norm,
                query.shares,
                query.planned.tolist(),
            )
            assert budgets[b].tolist() == slow, name


@given(
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(1, 16),
    st.integers(0, 8),
    st.integers(0, 500),
)
@examples(100)
def test_layer_allocators(layers: int, heads: int, window: int, n_sink: int, extra: int) -> None:
    query = LayerQuery(layers, heads, window + n_sink + extra, window, n_sink)
    statistics = made_statistics.make(list(range(layers)), 1, Rope((1.0,), 1.0, 2), seed=extra)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.safetensors"
        statistics.save(path)
        costs = Path(folder) / "c.json"
        made_costs.make(layers, heads, seed=extra).save(costs)
        allocator = LAYER_ALLOCATORS.create(f"cost({costs})")
        plan = allocator.plan_heads(query)
        assert plan is not None and allocator.allocate(query) == [sum(row) for row in plan]
        sizes = [size for row in plan for size in row]
        assert len(sizes) == layers * heads and sum(sizes) == query.total
        assert min(sizes) >= min(window + n_sink + 8, query.budget)
        assert max(sizes) <= max(6 * query.budget, 1)
        plan = LAYER_ALLOCATORS.create(f"cost({costs}, by=layers)").plan_heads(query)
        assert plan is not None and sum(sum(row) for row in plan) == query.total
        assert all(len(row) == heads and len(set(row)) == 1 for row in plan)
        for name in ("cake", "dynamickv"):
            budgets = LAYER_ALLOCATORS.create(f"{name}({path})").allocate(query)
            assert budgets == reference.layer_budgets(
                name, statistics, heads, query.budget, window, n_sink
            )
            assert sum(budgets) == query.total and min(budgets) >= query.least
    for spec in ("uniform", "pyramid", "pyramid(beta=5)"):
        budgets = LAYER_ALLOCATORS.create(spec).allocate(query)
        assert len(budgets) == layers and sum(budgets) == layers * heads * query.budget
        assert min(budgets) >= query.least


@given(
    st.lists(
        st.lists(st.floats(0, 1), min_size=4, max_size=4).map(lambda c: sorted(c, reverse=True)),
        min_size=1,
        max_size=4,
    ),
    st.integers(2, 6),
    st.integers(0, 20),
    st.data(),
)
@examples(150)
def test_least_cost(curves: list[list[float]], lower: int, room: int, data: st.DataObject) -> None:
    points, upper = [3, 5, 9, 20], lower + room
    total = data.draw(st.integers(len(curves) * lower, len(curves) * upper))
    found = minimise(
        torch.tensor(curves, dtype=torch.float64),
        torch.tensor(points).double(),
        total,
        lower,
        upper,
    )
    assert int(found.sum()) == total and int(found.min()) >= lower and int(found.max()) <= upper
    cost = reference.least_cost(curves, points, total, lower, upper)
    sizes = torch.arange(lower, upper + 1).double()
    costs = interpolate(
        torch.tensor(curves, dtype=torch.float64), torch.tensor(points).double(), sizes
    )
    ours = sum(float(costs[i, size - lower]) for i, size in enumerate(found.tolist()))
    # Between two points of a convex hull one item alone is cut short: never worse than its gap.
    gap = float((costs[:, :1] - costs[:, -1:]).max())
    assert cost * (1 - 1e-9) <= ours <= (cost + gap) * (1 + 1e-9)
    slopes = costs[:, :-1] - costs[:, 1:]
    if bool((slopes[:, :-1] >= slopes[:, 1:]).all()):  # convex: exact, up to ties of items
        assert ours <= cost * (1 + 1e-9)


def test_cost_of_one_kind_of_text(tmp_path: Path) -> None:
    query, path = LayerQuery(6, 3, 40, 4), tmp_path / "costs.json"
    profile = made_costs.make(6, 3)
    profile.save(path)
    plans = {}
    for kind, texts in (("code", [0]), ("prose", [1])):
        plans[kind] = LAYER_ALLOCATORS.create(f"cost({path}, kind={kind})").plan_heads(query)
        curves = torch.tensor(profile.curves(texts), dtype=torch.float64).flatten(0, 1)
        points = torch.tensor(profile.budgets).double()
        assert minimise(curves, points, query.total, 12, 240).view(6, 3).tolist() == plans[kind]
    assert plans["code"] != plans["prose"]
    with pytest.raises(UsageError, match=r"no kind of text.*code, prose"):
        LAYER_ALLOCATORS.create(f"cost({path}, kind=poems)").allocate(query)


def test_cost_of_whole_layers(tmp_path: Path) -> None:
    query, path = LayerQuery(6, 3, 40, 4), tmp_path / "costs.json"
    profile = made_costs.make(6, 3)
    profile.save(path)
    curves = torch.tensor(profile.layer_curves(), dtype=torch.float64)
    found = minimise(curves, torch.tensor(profile.budgets).double(), 240, 12, 240).tolist()
    allocator = LAYER_ALLOCATORS.create(f"cost({path}, by=layers)")
    assert allocator.plan_heads(query) == [[size] * 3 for size in found]
    assert len(set(found)) > 1
    data = json.loads(path.read_text())
    del data["layer_costs"]
    path.write_text(json.dumps(data | {"version": 1}))  # a file from before there were any
    assert load_costs(path) == replace(profile, layer_costs=[])
    with pytest.raises(UsageError, match="no costs of whole layers"):
        allocator.allocate(query)
    with pytest.raises(UsageError, match="by='rows' must be 'heads' or 'layers'"):
        LAYER_ALLOCATORS.create(f"cost({path}, by=rows)")
    for wrong in ([[[1.0]]], [[]] * 2, [[[1.0] * 3] * 6] * 2):
        path.write_text(json.dumps(data | {"version": 2, "layer_costs": wrong}))
        with pytest.raises(UsageError, match="layer_costs must be"):
            load_costs(path)


def test_pyramid_is_the_published_line() -> None:
    budget, window, layers = 128, 8, 32
    free = budget - window
    least, most = free / 20, 2 * free - free / 20
    line = [most - i * (most - least) / (layers - 1) + window for i in range(layers)]
    budgets = LAYER_ALLOCATORS.create("pyramid").allocate(LayerQuery(layers, 8, budget, window))
    assert max(abs(b - 8 * x) for b, x in zip(budgets, line, strict=True)) <= 1
    assert budgets == sorted(budgets, reverse=True)


def test_parameters_are_checked() -> None:
    for spec in (
        "pyramid(beta=0)",
        "pyramid(gamma=1)",
        "pyramid(1, 2)",
        "pyramid(beta=x)",
        "cake(tau1=0)",
    ):
        with pytest.raises(UsageError):
            LAYER_ALLOCATORS.create(spec)
    for spec in ("adakv(safeguard=2)", "reasonalloc(mu=-1)", "reasonalloc(score_norm=none)"):
        with pytest.raises(UsageError):
            HEAD_ALLOCATORS.create(spec)
    with pytest.raises(UsageError, match="did you mean 'reasonalloc'"):
        HEAD_ALLOCATORS.create("reasonaloc")
