"""Compression in a shared pool of pages against each request alone in slabs; without vLLM."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from transformers import LlamaConfig

import made_costs
from examples import examples
from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.attention import choose_backend
from reasonalloc.calibrated.demand import config_hash
from reasonalloc.config import CompressionConfig, parse_arm
from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.recorder import Recorder
from reasonalloc.integrations.vllm.budget import EngineBudget
from reasonalloc.integrations.vllm.compression import Due, PoolCompressor
from reasonalloc.integrations.vllm.pages import Coded, Pages
from reasonalloc.integrations.vllm.runs import QueryRows, Runs, Tracked
from reasonalloc.planning.shapes import layer_shapes

LAYERS, HEADS, GROUP, WIDTH, BLOCKS, WINDOW = 3, 2, 2, 8, 500, 4
MODEL = LlamaConfig(
    hidden_size=HEADS * GROUP * WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS * GROUP,
    num_key_value_heads=HEADS,
)
ARMS = [
    "streaming_llm/uniform/uniform",
    "rkv/uniform/reasonalloc",
    "snapkv/pyramid/adakv",
    "random/pyramid/uniform",
    "knorm/uniform/adakv",
    "tova/pyramid/reasonalloc",
]


@dataclass
class Request:
    """A request with random queries, keys and values; alone in slabs, and in the pool."""

    name: str
    prompt: int
    arrives: int
    steps: int
    blocks: list[int] = field(default_factory=list)
    tokens: int = 0
    before: int = 0
    tracked: Tracked | None = None

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(hash((self.prompt, self.arrives)) % 1000)
        total = self.prompt + self.steps
        self.query = torch.randn(LAYERS, HEADS * GROUP, total, WIDTH, generator=generator)
        self.keys = torch.randn(LAYERS, HEADS, total, WIDTH, generator=generator)
        self.values = torch.randn(LAYERS, HEADS, total, WIDTH, generator=generator)

    def held_in(self, coded: Coded) -> None:
        """Make keys and values what a coded cache holds of them."""
        for part, numbers in enumerate((self.keys, self.values)):
            for layer, own in enumerate(numbers):
                stored = coded.store(own, layer, part)
                own.copy_(coded.numbers(stored[None], layer, part)[0])

    def alone(self, plan: EngineBudget) -> list[LayerCompressor]:
        planned = plan.planned or [None] * LAYERS
        return [
            LayerCompressor(
                layer,
                plan.totals[layer],
                plan.config,
                plan.policy,
                HEAD_ALLOCATORS.create(plan.config.arm.heads),
                choose_backend("eager"),
                Recorder("off"),
                planned[layer],
            )
            for layer in range(LAYERS)
        ]


def make_plan(
    arm: str,
    budget: int,
    interval: int,
    stages: tuple[tuple[int, int], ...] | None = None,
    **more: object,
) -> EngineBudget:
    parsed = parse_arm(arm)
    assert parsed is not None
    config = CompressionConfig(budget, parsed, interval=interval, window=WINDOW, **more)  # type: ignore[arg-type]
    return EngineBudget(config, layer_shapes(MODEL, "tiny"), MODEL, "tiny", stages=stages)


class Pool:
    """A scheduler, a worker and their memory, as small as can be."""

    def __init__(
        self,
        plan: EngineBudget,
        block_size: int,
        seed: int,
        coded: Coded | None = None,
        stage: int = 0,
    ) -> None:
        self.plan = plan
        self.layout = plan.layouts(block_size)[stage]
        self.before = plan.stage(stage).start or 0
        self.runs = Runs(self.layout, torch.device("cpu"), 8)
        raw = torch.full((LAYERS * BLOCKS * HEADS, 2, block_size, WIDTH), 7.0)
        raw = raw if coded is None else torch.full(raw.shape, 7, dtype=torch.uint8)
        steps = (HEADS, BLOCKS * HEADS, 1)
        self.runs.bind(Pages(raw, raw[:, 0], raw[:, 1], block_size, *steps, coded))
        self.queries = QueryRows(LAYERS, WINDOW)
        self.compressor = PoolCompressor(
            plan, 0, self.runs, self.queries, WIDTH**-0.5, None, stage=stage
        )
        self.free = list(range(1, BLOCKS))
        self.chance = random.Random(seed)
        self.chance.shuffle(self.free)

    def step(self, requests: list[Request], new: list[int]) -> None:
        reserve = self.layout.reserve
        shared: list[torch.Tensor] = []
        for request, more in zip(requests, new, strict=True):
            first, leading = reserve.first_event(request.prompt), reserve.leading(request.prompt)
            if request.tokens >= first:
                given_back = request.blocks[leading : request.before]
                self.free += [block for block in given_back if block]
                request.blocks[leading : request.before] = [0] * len(given_back)
            after = request.tokens + more
            need = reserve.needed(request.prompt, after)
            if after == first:
                # Any number of blocks may be shared, besides those that are not full.
                most = 0 if reserve.pin else request.prompt // reserve.block_size
                need = reserve.needed(request.prompt, after, self.chance.randint(0, most))
                request.before = need - reserve.blocks
            while len(request.blocks) < need:
                request.blocks.append(self.free.pop())
            if after == first:
                shared.append(self.pages_of(request.blocks[leading : request.before]))
        width = max(len(request.blocks) for request in requests)
        blocks = torch.tensor(
            [r.blocks + [0] * (width - len(r.blocks)) for r in requests], dtype=torch.int32
        )
        due = []
        for row, (request, more) in enumerate(zip(requests, new, strict=True)):
            tracked = self.runs.track(request.name, request.prompt, request.tokens)
            request.tracked, tracked.seen = tracked, request.tokens + more
            tracked.before = request.before
            span = torch.arange(request.tokens, request.tokens + more)
            for layer in range(self.runs.layers):
                self._store(layer, request, tracked, span, blocks[row : row + 1])
            request.tokens += more
            over = request.tokens - request.prompt
            if over >= 0 and over % reserve.interval == 0:
                due.append(Due(tracked, row, request.tokens))
        kept = [self.runs.pages.raw[pages].clone() for pages in shared]
        self.compressor.run(due, blocks)
        for pages, before in zip(shared, kept, strict=True):
            assert torch.equal(self.runs.pages.raw[pages], before)

    def pages_of(self, blocks: list[int]) -> torch.Tensor:
        """All pages of blocks."""
        pages, head = self.runs.pages, torch.arange(HEADS)
        layer = torch.arange(self.runs.layers)
        own = layer[:, None] * pages.of_layer + head * pages.of_head
        block = torch.tensor(blocks, dtype=torch.int64) * pages.of_block
        return (block[:, None, None] + own).flatten()

    def _store(
        self,
        layer: int,
        request: Request,
        tracked: Tracked,
        span: torch.Tensor,
        blocks: torch.Tensor,
    ) -> None:
        slot = torch.tensor([tracked.slot])
        index = self.runs.shift[layer, slot][0, :, None] + span
        size = self.layout.reserve.block_size
        table = self.runs.table(slot, blocks, int(index.max()) // size + 1)[layer, 0]
        to = table.gather(1, index // size).long() * size + index % size
        own = layer + self.before
        keys, values = request.keys[own][:, span], request.values[own][:, span]
        self.runs.pages.put(to, keys, values, layer)
        row = self.queries.lend(tracked)
        last = span[-WINDOW:]
        rows = torch.full_like(last, row)
        self.queries.note(layer, request.query[own].transpose(0, 1), last, rows, last % WINDOW)

    def held(self, layer: int, request: Request) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of every head's run, in order, read by way of the tables."""
        assert request.tracked is not None
        slot = torch.tensor([request.tracked.slot])
        lengths = self.runs.lengths(slot, torch.tensor([request.tokens], dtype=torch.int32))
        size = self.layout.reserve.block_size
        blocks = torch.tensor([request.blocks], dtype=torch.int32)
        pages = -(-int(lengths.max()) // size)
        table = self.runs.table(slot, blocks, pages)[layer, 0]
        found = []
        for head in range(HEADS):
            index = torch.arange(int(lengths[layer, 0, head]))
            slots = table[head][index // size].long() * size + index % size
            found.append(self.runs.pages.numbers_at(slots, layer))
        return found


def same(pool: Pool, request: Request, alone: list[LayerCompressor]) -> None:
    for layer, compressor in enumerate(alone[pool.before :][: pool.runs.layers]):
        slab = compressor.slab
        assert slab is not None
        rows = slab.as_rows()
        for head, (keys, values) in enumerate(pool.held(layer, request)):
            length = int(rows.lengths[0, head])
            index = rows.index[0, head, :length]
            assert torch.equal(keys, slab.keys[0, index])
            assert torch.equal(values, slab.values[0, index])


def drive(
    plan: EngineBudget,
    block_size: int,
    requests: list[Request],
    seed: int,
    coded: Coded | None = None,
    stage: int = 0,
) -> None:
    pool = Pool(plan, block_size, seed, coded, stage)
    alone = {request.name: request.alone(plan) for request in requests}
    for now in range(max(r.arrives + r.steps for r in requests) + 1):
        active = [r for r in requests if r.arrives <= now <= r.arrives + r.steps]
        if not active:
            continue
        new = [r.prompt if r.tokens == 0 else 1 for r in active]
        before = [r.tokens for r in active]
        pool.step(active, new)
        for request, first, more in zip(active, before, new, strict=True):
            span = slice(first, first + more)
            for layer, compressor in enumerate(alone[request.name]):
                compressor.forward(
                    request.query[layer][None, :, span],
                    request.keys[layer][None, :, span],
                    request.values[layer][None, :, span],
                    None,
                    WIDTH**-0.5,
                )
            # Right before and right after a compression, and at the end.
            since = (request.tokens - request.prompt) % plan.config.interval
            if since in (0, plan.config.interval - 1) or now == request.arrives + request.steps:
                same(pool, request, alone[request.name])
        done = {r.name for r in active if now == r.arrives + r.steps}
        for request in [r for r in active if r.name in done]:
            pool.free += [block for block in request.blocks if block]
            request.blocks = []
        pool.queries.give_back(
            pool.runs.forget_others({r.name for r in requests if r.name not in done})
        )
    assert sorted(pool.free) == list(range(1, BLOCKS))


@given(
    st.sampled_from(ARMS),
    st.integers(12, 24),
    st.integers(4, 12),
    st.sampled_from([1, 4, 8]),
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 10), st.integers(0, 50)),
        min_size=1,
        max_size=3,
    ),
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
