"""Attention over coded pages against the reference, in Triton's interpreter.

test_triton.py runs this; what the launcher refuses is in test_paged_coded.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import paged_reference
import recorded_graph
from examples import examples
from paged_reference import Paged
from reasonalloc import graphs
from reasonalloc.attention.kernels.paged import (
    PLAIN,
    CodedTables,
    Pool,
    RunTables,
    coded,
    paged_decode,
    paged_decode_coded,
    scratch_floats,
)
from reasonalloc.ops.codes import row_format
from reasonalloc.ops.page_rows import PageRows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies bfloat16 wrongly, but reads it.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
KINDS = ["int8", "int8:int4", "int4h", "fp8", "auto", "int4h:auto"]
LAYERS = 2


@dataclass(frozen=True)
class Case:
    """Sizes of a case.

    ``rows``: "padding", "plain" (not compressed) or "coded". ``most``: bounds of coded tokens and
    tails. ``plain``: of a compressed request. ``held``: type of the pool.
    """

    seed: int
    rows: tuple[str, ...]
    most: tuple[int, int]
    plain: int
    kinds: tuple[str, ...]
    channels: int
    group: int
    dim: int
    block_size: int
    layout: str
    dtype: torch.dtype
    held: torch.dtype


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads = draw(st.integers(1, 3))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=heads, max_size=heads))
    rows = st.sampled_from(["coded", "coded", "plain", "padding"])
    return Case(
        seed=draw(st.integers(0, 10**6)),
        rows=tuple(draw(st.lists(rows, min_size=1, max_size=3))),
        most=(draw(st.sampled_from([0, 20, 150])), draw(st.sampled_from([1, 20, 100]))),
        plain=draw(st.sampled_from([0, 1, 3, PLAIN])),
        kinds=tuple(kinds if draw(st.booleans()) else kinds[:1] * heads),
        channels=draw(st.integers(0, 2)),
        group=draw(st.integers(1, 6)),
        dim=draw(st.sampled_from([64, 80, 128, 256])),
        block_size=draw(st.sampled_from([16, 32])),
        layout=draw(st.sampled_from(["BLHNC", "LBHNC", "wide", "apart"])),
        dtype=draw(st.sampled_from(DTYPES)),
        held=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
    )


def integers(low: int, high: int, shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, generator=random, dtype=torch.int32)


class World:
    """A case made. What is not told to hold something is NaN, or a number of no page."""

    def __init__(self, case: Case) -> None:
        self.case, self.random = case, torch.Generator().manual_seed(case.seed)
        heads, size, dim = len(case.kinds), case.block_size, case.dim
        self.layer = case.seed % LAYERS
        elements = 2 * size * dim
        self.rows = [
            PageRows(
                row_format(kind, dim, dim, case.held), case.channels, elements * case.held.itemsize
            )
            for kind in case.kinds
        ]
        self.count, slots = len(case.rows), len(case.rows) + 2
        self.slots = torch.randperm(slots, generator=self.random)[: self.count].int()
        shape = (LAYERS, slots, heads)
        self.first, self.shift, self.coded, self.begin = (
            integers(-(2**20), 2**20, shape, self.random) for _ in range(4)
        )
        self.plain = integers(0, 2**20, (slots,), self.random)
        self.seen = torch.tensor([-row for row in range(self.count)], dtype=torch.int32)
        most = max(
            [1, *(self._place(row) for row, kind in enumerate(case.rows) if kind != "padding")]
        )
        numbers = 1 + torch.randperm(self.count * most, generator=self.random).int()
        self.blocks = numbers.view(self.count, most)
        self._pool(self.count * most + 1)
        for row, kind in enumerate(case.rows):
            if kind == "padding":
                self.slots[row], self.blocks[row] = 2**30, 2**30
                continue
            for head in range(heads):
                self._fill(row, head)
        tables = (self.first, self.shift, self.plain)
        self.tables = RunTables(*(x.to(DEVICE) for x in tables))
        self.coded_tables = CodedTables(self.coded.to(DEVICE), self.begin.to(DEVICE))

    def _place(self, row: int) -> int:
        """Decide what a request holds; returns the blocks that it needs."""
        case, slot, size = self.case, int(self.slots[row]), self.case.block_size
        heads, compressed = len(case.kinds), case.rows[row] == "coded"
        plain = case.plain if compressed else PLAIN
        tail = integers(1, case.most[1] + 1, (LAYERS, heads), self.random)
        many = integers(0, case.most[0] + 1, (LAYERS, heads), self.random) * compressed
        if not compressed:  # as long as a sequence
            tail[:] = tail.max()
        pages = torch.tensor(
            [[rows.pages(int(n)) for rows, n in zip(self.rows, own, strict=True)] for own in many],
            dtype=torch.int32,
        )
        self.plain[slot], self.coded[:, slot], self.begin[:, slot] = plain, many, pages * size
        ends = pages * size + tail
        self.seen[row] = int((many + tail).max()) + 7 * row * compressed
        self.shift[:, slot] = ends - self.seen[row]
        held = -(-ends // size)
        behind = (held - plain).clamp_min(0).flatten()
        order = torch.randperm(len(behind), generator=self.random)
        starts = torch.zeros_like(behind)
        starts[order] = behind[order].cumsum(0).int() - behind[order]
        self.first[:, slot] = starts.view(LAYERS, heads)
        last = int((starts + behind).max())
        return min(plain, int(held.max())) + -(-last // (LAYERS * heads))

    def _pool(self, blocks: int) -> None:
        case, heads = self.case, len(self.case.kinds)
        size, dim = case.block_size, case.dim
        layers = LAYERS + (case.layout == "wide")  # blocks with something else between them
        shape = (blocks, layers, heads, size, 2 * dim)
        if case.layout == "LBHNC":
            shape = (layers, blocks, *shape[2:])
        data = torch.full(shape, float("nan"), dtype=case.held)
        self.data = data.to(DEVICE)
        pages = [
            x.transpose(0, 1) if case.layout == "LBHNC" else x[:, :LAYERS]
            for x in (data, self.data)
        ]
        self.slow = Paged(pages[0], self.first, self.shift, self.plain, self.blocks, self.slots)
        self.pool = Pool.of(pages[1])
        if case.layout == "apart":  # the values of a page behind its keys
            strides = self.pool.strides[:3]
            self.pool = Pool(self.data, LAYERS, heads, size, dim, *strides, dim, size * dim)
        self.host = data

    def page(self, row: int, head: int, page: int) -> Tensor:
        """[elements], a view."""
        return self.slow.page(self.layer, row, head, page).view(-1)

    def tail(self, row: int, head: int, place: int) -> tuple[Tensor, Tensor]:
        """Key and value, views."""
        size, dim = self.case.block_size, self.case.dim
        page = self.page(row, head, place // size)
        if self.case.layout == "apart":
            both = page.view(2, size, dim)[:, place % size]
        else:
            both = page.view(size, 2, dim)[place % size]
        return both[0], both[1]

    def tokens(self, row: int, head: int) -> tuple[list[Tensor], range]:
        """Rows of coded tokens, [1 or more of a page, width], views; places of the tail."""
        entry, rows = (self.layer, int(self.slots[row]), head), self.rows[head]
        many, begin = int(self.coded[entry]), int(self.begin[entry])
        found = []
        for page in range(rows.pages(many)):
            inside = rows.view(self.page(row, head, page).view(torch.uint8)[None])[0]
            found.append(inside[: many - page * rows.per_page])
        return found, range(begin, int(self.shift[entry] + self.seen[row]))

    def _fill(self, row: int, head: int) -> None:
        rows, (pages, tail) = self.rows[head], self.tokens(row, head)
        for page in pages:
            keys, values = self.randn(2, len(page), self.case.dim)
            keys *= 1 + torch.rand(len(page), 1, generator=self.random)
            state = self.randn(len(page), self.case.channels)
            page.copy_(rows.encode(keys, values, torch.arange(len(page)), state))
        for place in tail:
            for vector in self.tail(row, head, place):
                vector.copy_(self.randn(self.case.dim))

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random)

    def run(self, row: int, head: int) -> tuple[Tensor, Tensor]:
        """Keys and values [tokens, dim] float64."""
        pages, tail = self.tokens(row, head)
        parts = [self.rows[head].decode(page) for page in pages]
        parts += [
            (key[None], value[None]) for key, value in (self.tail(row, head, p) for p in tail)
        ]
        keys, values = (torch.cat([x.double() for x in own]) for own in zip(*parts, strict=True))
        return keys, values

    def random_like(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Rows lie apart in memory, as those of a joint projection do."""
        return self.randn(shape[0], shape[1] + 1, *shape[2:]).to(DEVICE, dtype)[:, :-1]

    def arguments(
        self, splits: tuple[int, int], softcap: float, sink: float | None
    ) -> dict[str, Any]:
        """Of ``paged_decode_coded``."""
        self.data.copy_(self.host)
        dim, query_heads = self.case.dim, len(self.case.kinds) * self.case.group
        shape = (self.count, query_heads)
        floats = scratch_floats(*shape, dim, sum(splits))
        sinks = None if sink is None else (sink + self.randn(query_heads)).to(DEVICE)
        return {
            "query": self.random_like(*shape, dim, dtype=self.case.dtype),
            "pool": self.pool,
            "tables": self.tables,
            "coded": self.coded_tables,
            "rows": self.rows,
            "layer": self.layer,
            "block_table": self.blocks.to(DEVICE),
            "seq_lens": self.seen.to(DEVICE),
            "slots": self.slots.to(DEVICE),
            "out": self.random_like(*shape, dim, dtype=self.case.dtype),
            "lse": self.randn(*shape).to(DEVICE),
            "scratch": torch.full((floats + 3,), float("nan"), device=DEVICE),
            "splits": splits[0],
            "tail_splits": splits[1],
            "scaling": dim**-0.5,
            "softcap": softcap,
            "sinks": sinks,
        }

    def expected(self, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        sinks = None if given["sinks"] is None else given["sinks"].cpu()
        return paged_reference.attended(
            given["query"].cpu(), len(self.case.kinds), self.seen, self.run, given["scaling"],
            given["softcap"], sinks, given["out"].cpu(), given["lse"].cpu(),
        )  # fmt: skip

    def compare(self, given: dict[str, Any], expected: tuple[Tensor, Tensor]) -> None:
        limit = TOLERANCE[self.case.dtype]
        out, lse = (given[name].cpu().double() for name in ("out", "lse"))
        torch.testing.assert_close(out, expected[0], rtol=limit, atol=limit)
        torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=1e-3)


@given(
    cases(),
    st.sampled_from([(1, 1), (2, 1), (1, 4), (4, 2), (3, 5)]),
    st.sampled_from([0.0, 2.0]),
    st.sampled_from([None, 0.0, 3.0, -200.0, 200.0]),
)
@examples(10)
def test_decode(case: Case, splits: tuple[int, int], softcap: float, sink: float | None) -> None:
    world = World(case)
    given = world.arguments(splits, softcap, sink)
    expected = world.expected(given)
    paged_decode_coded(**given)
    world.compare(given, expected)


def a_case(**changes: Any) -> Case:
    made: dict[str, Any] = {
        "seed": 5,
        "rows": ("coded", "padding", "plain"),
        "most": (60, 30),
        "plain": 1,
        "kinds": ("int4h:int8", "fp8"),
        "channels": 1,
        "group": 2,
        "dim": 64,
        "block_size": 16,
        "layout": "BLHNC",
        "dtype": torch.float32,
        "held": torch.float32,
    }
    return Case(**made | changes)


def test_without_a_coded_token_it_is_plain_attention() -> None:
    world = World(a_case(rows=("plain", "plain"), most=(0, 100), dtype=torch.float16))
    given = world.arguments((1, 2), 0.0, 1.0)
    paged_decode_coded(**given)
    scratch = torch.zeros(scratch_floats(2, 4, 64, 2), device=DEVICE)
    left = ("coded", "rows", "tail_splits")
    plain = {name: x for name, x in given.items() if name not in left}
    plain |= {"splits": 2, "scratch": scratch, "out": given["out"].clone()}
    plain["lse"] = given["lse"].clone()
    paged_decode(**plain)
    assert torch.equal(plain["out"], given["out"]) and torch.equal(plain["lse"], given["lse"])


def test_a_run_without_a_token() -> None:
    """A head of a live row whose tail is empty, and one with nothing at all."""
    world = World(a_case(rows=("coded",), most=(20, 1)))
    entry = (world.layer, int(world.slots[0]))
    given = world.arguments((2, 2), 0.0, None)
    tables = given["tables"]
    tables.shift[entry] = given["coded"].begin[entry] - given["seq_lens"][0]
    given["coded"].coded[(*entry, 1)] = 0
    tables.shift[(*entry, 1)] -= 3  # whatever it is, it is no token
    paged_decode_coded(**given)
    assert torch.equal(given["out"][0, 2:], torch.zeros_like(given["out"][0, 2:]))
    assert torch.equal(given["lse"][0, 2:].cpu(), torch.full((2,), -torch.inf))
    assert given["out"].isfinite().all() and given["lse"][0, :2].isfinite().all()


def test_replayed() -> None:
    """A step that was noted computes with the lengths of its repetition, and copies nothing."""
    world = World(a_case())
    given = world.arguments((2, 2), 0.0, None)
    capture = graphs.capture if DEVICE.type == "cuda" else recorded_graph.capture
    paged_decode_coded(**given)
    known = coded._launches.cache_info().misses
    replay = capture(lambda: paged_decode_coded(**given), DEVICE)
    replay()
    world.seen[2] -= 1
    given["seq_lens"].copy_(world.seen)
    given["query"].mul_(0.5)
    expected = world.expected(given)
    replay()
    world.compare(given, expected)
    assert coded._launches.cache_info().misses == known


def test_what_the_operator_says_of_itself() -> None:
    world = World(a_case(rows=("coded", "padding")))
    given = world.arguments((1, 2), 0.0, None)
    formats, which = coded._formats(tuple(world.rows), 16, 64, torch.float32)
    tables = (world.tables.first, world.tables.shift, world.tables.plain)
    runs = (*tables, world.coded_tables.coded, world.coded_tables.begin)
    rows = (given["block_table"], given["seq_lens"], given["slots"])
    written = (given["out"], given["lse"], given["scratch"])
    arguments = (given["query"], world.pool.data, *runs, *rows, None, *written, list(formats))
    torch.library.opcheck(
        coded._decode_coded,
        (*arguments, list(which), world.pool.strides, 16, world.layer, 1, 2, 0.125, 0.0),
        test_utils=("test_schema", "test_faketensor"),
    )
