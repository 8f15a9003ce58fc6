"""Requests whose tokens lie in a shared pool of pages, and alone in slabs; without vLLM."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from transformers import LlamaConfig

from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.attention import choose_backend
from reasonalloc.config import CompressionConfig, parse_arm
from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.recorder import Recorder
from reasonalloc.integrations.vllm.budget import EngineBudget
from reasonalloc.integrations.vllm.compression import Due, PoolCompressor
from reasonalloc.integrations.vllm.observation import FLUSH, PoolObserver, Unseen
from reasonalloc.integrations.vllm.pages import Coded, Pages
from reasonalloc.integrations.vllm.runs import QueryRows, Runs, Tracked
from reasonalloc.integrations.vllm.views import CodedPool
from reasonalloc.planning.shapes import layer_shapes

LAYERS, HEADS, GROUP, WIDTH, BLOCKS, WINDOW = 3, 2, 2, 8, 500, 4
MODEL = LlamaConfig(
    hidden_size=HEADS * GROUP * WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS * GROUP,
    num_key_value_heads=HEADS,
)


# Of requests: tokens of their prompts, when they arrive, steps.
SHAPES = st.lists(
    st.tuples(st.integers(1, 60), st.integers(0, 10), st.integers(0, 50)), min_size=1, max_size=3
)


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
        formats = plan.formats_of(plan.shard(0))
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
                formats[layer],
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
        channels = plan.policy.state_channels
        self.runs = Runs(self.layout, torch.device("cpu"), 8, channels)
        raw = torch.full((LAYERS * BLOCKS * HEADS, 2, block_size, WIDTH), 7.0)
        raw = raw if coded is None else torch.full(raw.shape, 7, dtype=torch.uint8)
        steps = (HEADS, BLOCKS * HEADS, 1)
        pages = Pages(raw, raw[:, 0], raw[:, 1], block_size, *steps, coded)
        self.runs.bind(pages)
        bits = None
        if self.layout.coding is not None:
            bits = CodedPool(self.layout.coding, pages, torch.device("cpu"))
        self.queries = QueryRows(LAYERS, plan.query_width)
        self.compressor = PoolCompressor(
            plan, 0, self.runs, self.queries, WIDTH**-0.5, None, stage=stage, coded=bits
        )
        self.observer = None
        if channels:
            given = (self.runs, self.queries, WIDTH**-0.5, None, None, None, bits)
            self.observer = PoolObserver(plan.policy, *given)
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
                most = 0 if reserve.stays else request.prompt // reserve.block_size
                need = reserve.needed(request.prompt, after, self.chance.randint(0, most))
                request.before = need - reserve.own(request.prompt)
            while len(request.blocks) < need:
                request.blocks.append(self.free.pop())
            if after == first:
                shared.append(self.pages_of(request.blocks[leading : request.before]))
        width = max(len(request.blocks) for request in requests)
        blocks = torch.tensor(
            [r.blocks + [0] * (width - len(r.blocks)) for r in requests], dtype=torch.int32
        )
        due, unseen = [], []
        for row, (request, more) in enumerate(zip(requests, new, strict=True)):
            tracked = self.runs.track(request.name, request.prompt, request.tokens)
            request.tracked, tracked.seen = tracked, request.tokens + more
            tracked.before = request.before
            span = torch.arange(request.tokens, request.tokens + more)
            for layer in range(self.runs.layers):
                self._store(layer, request, tracked, span, blocks[row : row + 1])
                if self.observer is not None and request.tokens < request.prompt:
                    query = request.query[layer + self.before][:, span].transpose(0, 1)
                    given = (layer, query, tracked, request.tokens, blocks[row])
                    self.observer.prefill(*given)
                    tracked.observed = request.tokens + more
            request.tokens += more
            over = request.tokens - request.prompt
            if over >= 0 and over % reserve.interval == 0:
                due.append(Due(tracked, row, request.tokens))
            late = request.tokens - tracked.observed
            if late >= FLUSH or (late and over % reserve.interval == 0):
                unseen.append(Unseen(tracked, row, request.tokens))
        if self.observer is not None and unseen:
            self.observer.steps(unseen, blocks)
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
        if self.runs.state is not None:
            self.runs.state[to] = 0
        own = layer + self.before
        keys, values = request.keys[own][:, span], request.values[own][:, span]
        self.runs.pages.put(to, keys, values, layer)
        row = self.queries.lend(tracked)
        width = self.queries.width
        last = span[-width:]
        rows = torch.full_like(last, row)
        self.queries.note(layer, request.query[own].transpose(0, 1), last, rows, last % width)

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
            coded = self._coded(layer, head, int(slot), table[head])
            begin = int(self.runs.begin[layer, slot, head])
            index = torch.arange(begin, int(lengths[layer, 0, head]))
            slots = table[head][index // size].long() * size + index % size
            tail = self.runs.pages.numbers_at(slots, layer)
            found.append(tuple(torch.cat(each) for each in zip(coded, tail, strict=True)))
        return found

    def _coded(
        self, layer: int, head: int, slot: int, pages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that a run begins with, one after the other; positions rise."""
        count, coding = int(self.runs.coded[layer, slot, head]), self.layout.coding
        keys, values, last = [torch.zeros(0, WIDTH)], [torch.zeros(0, WIDTH)], -1
        for number in range(count):
            assert coding is not None
            form = coding.rows_of(layer)[head]
            page = self.runs.pages.memory[int(pages[number // form.per_page])].view(torch.uint8)
            at = number % form.per_page * form.width
            row = page[at : at + form.width]
            key, value = form.decode(row[None])
            keys.append(key)
            values.append(value)
            position = int(form.positions(row))
            assert last < position
            last = position
        return torch.cat(keys), torch.cat(values)


def same(pool: Pool, request: Request, alone: list[LayerCompressor]) -> None:
    for layer, compressor in enumerate(alone[pool.before :][: pool.runs.layers]):
        slab = compressor.slab
        assert slab is not None
        rows, runs = slab.as_rows(), pool.held(layer, request)
        held = sum(len(keys) for keys, _ in runs)
        assert held == pool.layout.held(layer, request.prompt, request.tokens)
        for head, (keys, values) in enumerate(runs):
            length = int(rows.lengths[0, head])
            index = rows.index[0, head, :length]
            assert torch.equal(keys, rows.keys[0, index])
            assert torch.equal(values, rows.values[0, index])


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
