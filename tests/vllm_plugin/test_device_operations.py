"""What a boundary asks of a device: no answer, and as few operations for many layers as for one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

import made_costs
from reasonalloc.cache.host import DeferredMax
from reasonalloc.calibrated.demand import config_hash
from reasonalloc.config import CompressionConfig, parse_arm
from reasonalloc.integrations.vllm.budget import EngineBudget
from reasonalloc.integrations.vllm.compression import Due, PoolCompressor
from reasonalloc.integrations.vllm.observation import FLUSH, PoolObserver, Unseen
from reasonalloc.integrations.vllm.pages import Pages
from reasonalloc.integrations.vllm.runs import QueryRows, Runs
from reasonalloc.integrations.vllm.views import CodedPool
from reasonalloc.planning.shapes import layer_shapes

HEADS, GROUP, WIDTH, BLOCK = 2, 2, 8, 4
BUDGET, INTERVAL, WINDOW = 24, 8, 4
ARMS = [
    "rkv/uniform/uniform",
    "rkv/uniform/adakv",
    "snapkv/pyramid/reasonalloc",
    "value_aware/pyramid/adakv",
    "h2o/uniform/uniform",
    "lazy_eviction/uniform/uniform",
    "random/uniform/uniform",
    "knorm/uniform/adakv",
    "streaming_llm/pyramid/uniform",
    "tova/uniform/adakv",
]
# With a format of older tokens.
CODED = [
    "rkv/uniform/adakv int8",
    "value_aware/pyramid/adakv int8:int4",
    "h2o/uniform/uniform int4",
]


class Count(TorchDispatchMode):
    """Counts operations that are no mere views."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def config_of(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=HEADS * GROUP * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS * GROUP,
        num_key_value_heads=HEADS,
    )


def make_plan(arm: str, layers: int, **more: object) -> EngineBudget:
    arm, _, kind = arm.partition(" ")
    parsed = parse_arm(arm)
    assert parsed is not None
    given = {"interval": INTERVAL, "window": WINDOW, "n_sink": 1, "kv_dtype": kind or "auto"}
    config = CompressionConfig(BUDGET, parsed, **{**given, **more})  # type: ignore[arg-type]
    model = config_of(layers)
    return EngineBudget(config, layer_shapes(model, "tiny"), model, "tiny")


class Worker:
    """Two requests that reach boundaries, on tensors that may hold nothing."""

    def __init__(self, plan: EngineBudget, layers: int, blocks: int = 64) -> None:
        self.layers, self.policy = layers, plan.policy
        layout, device = plan.layouts(BLOCK)[0], torch.device("cpu")
        self.runs = Runs(layout, device, 4, plan.policy.state_channels)
        raw = torch.zeros(layers * blocks * HEADS, 2, BLOCK, WIDTH)
        pages = Pages(raw, raw[:, 0], raw[:, 1], BLOCK, HEADS, blocks * HEADS, 1)
        self.runs.bind(pages)
        self.queries = QueryRows(layers, max(WINDOW, FLUSH))
        bits = None if layout.coding is None else CodedPool(layout.coding, pages, device)
        given = (self.runs, self.queries, 0.3, None)
        self.compressor = PoolCompressor(plan, 0, *given, coded=bits)
        self.observer = PoolObserver(plan.policy, *given, coded=bits)
        self.tracked = [self.runs.track(name, start, 0) for name, start in (("a", 40), ("b", 64))]
        self.blocks = torch.arange(1, 41, dtype=torch.int32).view(2, 20)

    def note(self) -> None:
        """Queries of the last tokens."""
        query = torch.ones(2, HEADS * GROUP, WIDTH)
        rows = torch.tensor([self.queries.lend(request) for request in self.tracked])
        for layer in range(self.layers):
            for place in range(self.queries.width):
                token = torch.arange(2)
                self.queries.note(layer, query, token, rows, torch.full((2,), place))

    def event(self, tokens: tuple[int, int]) -> int:
        """Operations of a compression."""
        self.note()
        due = [
            Due(request, row, n)
            for row, (request, n) in enumerate(zip(self.tracked, tokens, strict=True))
        ]
        with Count() as count:
            self.compressor.run(due, self.blocks)
        return count.number

    def flush(self, tokens: tuple[int, int]) -> int:
        """Operations of taking in the attention of decode steps."""
        self.note()
        unseen = [
            Unseen(request, row, n)
            for row, (request, n) in enumerate(zip(self.tracked, tokens, strict=True))
        ]
        with Count() as count:
            self.observer.steps(unseen, self.blocks)
        return count.number


@pytest.mark.parametrize("arm", [*ARMS, *CODED])
def test_a_boundary_reads_nothing_back(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Asked for at one boundary and read at the next, an interval later.
    monkeypatch.setattr(DeferredMax, "get", lambda self: 2 * BUDGET)
    plan = make_plan(arm, 2)
    with FakeTensorMode():
        worker = Worker(plan, 2)
        worker.event((40, 64))
        if worker.policy.state_channels:
            worker.flush((44, 68))
        worker.event((48, 72))
        assert worker.tracked[0].longest is not None


@pytest.mark.parametrize("arm", [*ARMS, *CODED])
def test_all_layers_are_one_batch(arm: str) -> None:
    counts = []
    for layers in (2, 12):
        worker = Worker(make_plan(arm, layers), layers)
        first = worker.event((40, 64))
        flush = worker.flush((44, 68)) if worker.policy.state_channels else 0
        counts.append((first, flush, worker.event((48, 72))))
    few, many = counts
    assert few == many
    assert max(many) <= (320 if arm in ARMS else 520)


def test_formats_of_single_heads(tmp_path: Path) -> None:
    """Every further one is coded by itself, whatever the number of layers."""
    counts = set()
    for layers in (6, 12):
        costs = made_costs.make(layers, HEADS, fingerprint=config_hash(config_of(layers).to_dict()))
        made_costs.in_formats(costs).save(tmp_path / "costs.json")
        arm = "value_aware/cost(bits=planned)/planned"
        plan = make_plan(arm, layers, profile=str(tmp_path / "costs.json"))
        layout = plan.layouts(BLOCK)[0]
        assert layout.coding is not None and len(layout.coding.rows) == 3
        worker = Worker(plan, layers)
        worker.event((40, 64))
        counts.add(worker.event((48, 72)))
    assert len(counts) == 1
    assert max(counts) <= 520 + 2 * 70
