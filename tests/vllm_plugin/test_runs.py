"""Compression in a shared pool of pages against each request alone in slabs; without vLLM."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import made_costs
from examples import examples
from pooled_requests import HEADS, LAYERS, MODEL, SHAPES, Request, drive, make_plan
from reasonalloc.calibrated.demand import config_hash
from reasonalloc.integrations.vllm.pages import Coded

ARMS = [
    "streaming_llm/uniform/uniform",
    "rkv/uniform/reasonalloc",
    "snapkv/pyramid/adakv",
    "random/pyramid/uniform",
    "knorm/uniform/adakv",
    "tova/pyramid/reasonalloc",
]


@given(
    st.sampled_from(ARMS),
    st.integers(12, 24),
    st.integers(4, 12),
    st.sampled_from([1, 4, 8]),
    SHAPES,
    st.integers(0, 3),
    st.sampled_from(["evict", "pin"]),
    st.integers(0, 100),
)
@examples(25, suppress_health_check=[HealthCheck.too_slow])
def test_the_pool_keeps_what_slabs_keep(
    arm: str,
    budget: int,
    interval: int,
    block_size: int,
    shapes: list[tuple[int, int, int]],
    n_sink: int,
    prompt: str,
    seed: int,
) -> None:
    plan = make_plan(arm, budget, interval, n_sink=n_sink, prompt=prompt, seed=seed)
    requests = [Request(str(i), *shape) for i, shape in enumerate(shapes)]
    drive(plan, block_size, requests, seed)


def test_budgets_planned_per_head(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    costs = made_costs.make(LAYERS, HEADS, fingerprint=config_hash(MODEL.to_dict()))
    dataclasses.replace(costs, policy="rkv").save(path)
    plan = make_plan("calibrated/cost/planned", 20, 8, profile=str(path))
    assert plan.planned is not None
    assert len({tuple(heads) for heads in plan.planned}) > 1
    drive(plan, 4, [Request("a", 50, 0, 40), Request("b", 9, 3, 60)], 0)


@pytest.mark.parametrize(
    "arm", ["rkv/uniform/reasonalloc", "snapkv/pyramid/adakv", "knorm/uniform/adakv"]
)
def test_a_cache_of_one_byte_numbers(arm: str) -> None:
    """Scored as what it stands for, moved as it is: unequal scales, so that none is left out."""
    scales = ((0.5, 0.03), (1.0, 1.0), (0.007, 2.0))
    coded = Coded("fp8", scales, torch.tensor(scales))
    requests = [Request("a", 50, 0, 40), Request("b", 9, 3, 60)]
    for request in requests:
        request.held_in(coded)
    plan = make_plan(arm, 20, 8, n_sink=1)
    drive(plan, 4, requests, 0, coded)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("arm", ["random/pyramid/uniform", "rkv/pyramid/reasonalloc"])
def test_a_stage_of_a_pipeline(arm: str, stage: int) -> None:
    """It has some of the layers, with budgets and chance of their own."""
    plan = make_plan(arm, 20, 8, ((0, 1), (1, 3)))
    drive(plan, 4, [Request("a", 50, 0, 40), Request("b", 9, 3, 60)], 0, stage=stage)


def test_budgets_planned_per_head_in_a_stage(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    costs = made_costs.make(LAYERS, HEADS, fingerprint=config_hash(MODEL.to_dict()))
    dataclasses.replace(costs, policy="rkv").save(path)
    plan = make_plan("calibrated/cost/planned", 20, 8, ((0, 1), (1, 3)), profile=str(path))
    drive(plan, 4, [Request("a", 50, 0, 40)], 0, stage=1)


def test_numbers_that_one_byte_cannot_hold() -> None:
    coded = Coded("fp8", ((2.0, 1.0),), torch.tensor([[2.0, 1.0]]))
    given = torch.tensor([[1.0, 1e6, -1e6, 1e-9, 900.0]])
    stored = coded.store(given, 0, 0)
    assert stored.dtype == torch.uint8
    assert coded.numbers(stored, 0, 0).tolist() == [[1.0, 896.0, -896.0, 0.0, 896.0]]
    assert coded.numbers(stored, torch.tensor([0]), 1).tolist() == [[0.5, 448, -448, 0.0, 448]]
