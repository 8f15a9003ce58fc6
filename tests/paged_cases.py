"""The paged kernels against the reference; test_paged.py runs this in Triton's interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import paged_reference
from examples import examples
from paged_reference import E4M3, Paged
from reasonalloc.attention.kernels import paged as kernels
from reasonalloc.attention.kernels.paged import PLAIN, Pool, RunTables, paged_decode, paged_store

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LAYERS = 2


@dataclass(frozen=True)
class Case:
    """Sizes of a case; ``lengths``: most tokens that a run of each row has, 0 for padding.

    ``plain``: of each row, None for ``PLAIN``.
    """

    seed: int
    lengths: tuple[int, ...]
    plain: tuple[int | None, ...]
    heads: int
    group: int
    dim: int
    block_size: int
    layout: str
    dtype: torch.dtype
    fp8: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = draw(st.integers(1, 3))
    lengths = st.one_of(st.integers(0, 40), st.integers(100, 180))
    plain = st.sampled_from([None, 0, 1, 3])
    return Case(
        seed=draw(st.integers(0, 10**6)),
        lengths=tuple(draw(lengths) for _ in range(rows)),
        plain=tuple(draw(plain) for _ in range(rows)),
        heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16])),
        dim=draw(st.sampled_from([32, 64, 80, 96, 128, 160, 256])),
        block_size=draw(st.sampled_from([8, 16])),
        layout=draw(st.sampled_from(["BLHNC", "LBHNC", "wide", "apart"])),
        dtype=draw(st.sampled_from(DTYPES)),
        fp8=draw(st.booleans()),
    )


def tables(case: Case, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """first, shift, plain, slots and sequence lengths: runs that share no page."""
    rows = len(case.lengths)
    slots = torch.randperm(rows + 2, generator=random)[:rows].int()
    shape = (LAYERS, rows + 2, case.heads)
    first = torch.randint(0, 2**20, shape, generator=random, dtype=torch.int32)
    shift = torch.randint(-(2**20), 2**20, shape, generator=random, dtype=torch.int32)
    plain = torch.randint(0, 2**20, (rows + 2,), generator=random, dtype=torch.int32)
    seen = [0] * rows
    for row, (longest, pages) in enumerate(zip(case.lengths, case.plain, strict=True)):
        slot = int(slots[row])
        first[:, slot], shift[:, slot] = 0, 0
        plain[slot] = PLAIN if pages is None else pages
        seen[row] = longest
        if pages is None or longest == 0:
            continue
        least = max(1, min(longest, pages * case.block_size))
        lengths = torch.randint(least, longest + 1, (LAYERS, case.heads), generator=random)
        seen[row] = longest + 7 * row  # some of the sequence is not held
        shift[:, slot] = lengths.int() - seen[row]
        held = (-(-lengths // case.block_size) - pages).clamp_min(0).flatten()
        order = torch.randperm(len(held), generator=random)
        starts = torch.zeros_like(held)
        starts[order] = held[order].cumsum(0) - held[order]
        first[:, slot] = starts.view(LAYERS, case.heads).int()
    return first, shift, plain, slots, torch.tensor(seen, dtype=torch.int32)


def blocks_of(case: Case, slots: Tensor, first: Tensor, seen: Tensor, shift: Tensor) -> int:
    """Blocks that are enough for every row."""
    per_block, most = LAYERS * case.heads, 1
    for row, pages in enumerate(case.plain):
        longest = -(-int(seen[row]) // case.block_size)
        if pages is not None and case.lengths[row]:
            slot = int(slots[row])
            held = -(-(shift[:, slot] + seen[row]) // case.block_size)
            behind = int((first[:, slot] + (held - pages).clamp_min(0)).max())
            longest = pages + -(-behind // per_block)
        most = max(most, longest)
    return most


def pool_of(case: Case, blocks: int, random: torch.Generator) -> tuple[Tensor, Pool]:
    """Pages as [blocks, layers, heads, block_size, 2 * dim] for the reference, and for kernels."""
    heads, size, dim = case.heads, case.block_size, case.dim
    dtype = torch.float32 if case.fp8 else case.dtype
    shape = (blocks, LAYERS, heads, size, 2 * dim)
    if case.layout == "LBHNC":
        shape = (LAYERS, blocks, heads, size, 2 * dim)
    elif case.layout == "wide":  # blocks with something else between them
        shape = (blocks, LAYERS + 1, heads, size, 2 * dim)
    elif case.layout == "apart":  # the values of a page behind its keys
        shape = (blocks, LAYERS, heads, 2, size, dim)
    data = torch.randn(shape, generator=random).to(DEVICE, E4M3 if case.fp8 else dtype)
    if case.layout == "apart":
        inner = size * dim
        strides = (LAYERS * heads * 2 * inner, heads * 2 * inner, 2 * inner, dim, inner)
        return data, Pool(data, LAYERS, heads, size, dim, *strides)
    pages = data.transpose(0, 1) if case.layout == "LBHNC" else data[:, :LAYERS]
    as_bytes = case.fp8 and case.seed % 2
    return pages, Pool.of(pages.view(torch.uint8) if as_bytes else pages)


class World:
    """A case made: what the kernels take, and the same for the reference, on the CPU."""

    def __init__(self, case: Case) -> None:
        self.random = torch.Generator().manual_seed(case.seed)
        first, shift, plain, slots, self.seen = tables(case, self.random)
        most, rows = blocks_of(case, slots, first, self.seen, shift), len(slots)
        numbers = 1 + torch.randperm(rows * most, generator=self.random).int()
        blocks = numbers.view(rows, most)
        self.data, self.pool = pool_of(case, rows * most + 1, self.random)
        self.tables = RunTables(*(x.to(DEVICE) for x in (first, shift, plain)))
        self.blocks, self.slots = blocks.to(DEVICE), slots.to(DEVICE)
        self.slow = Paged(self._readable(case), first, shift, plain, blocks, slots)

    def _readable(self, case: Case) -> Tensor:
        data = self.data.cpu().float() if case.fp8 else self.data.cpu().clone()
        if case.layout == "apart":  # [blocks, layers, heads, 2, size, dim]
            data = data.transpose(3, 4).flatten(4).clone()
        return data.to(E4M3) if case.fp8 else data

    def random_like(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Rows lie apart in memory, as those of a joint projection do."""
        wide = torch.randn(shape[0], shape[1] + 1, *shape[2:], generator=self.random)
        return wide.to(DEVICE, dtype)[:, :-1]


@given(
    cases(),
    st.integers(1, 8),
    st.sampled_from([0.0, 2.0]),
    st.sampled_from([None, 0.0, 3.0, -200.0, 200.0]),
)
@examples(16)
def test_decode(case: Case, splits: int, softcap: float, sink: float | None) -> None:
    world = World(case)
    rows, query_heads = len(case.lengths), case.heads * case.group
    query = world.random_like(rows, query_heads, case.dim, dtype=case.dtype)
    out = world.random_like(rows, query_heads, case.dim, dtype=case.dtype)
    lse = torch.randn(rows, query_heads, generator=world.random).to(DEVICE)
    floats = kernels.scratch_floats(rows, query_heads, case.dim, splits)
    scratch = torch.full((floats + 3,), float("nan"), device=DEVICE)
    sinks = None if sink is None else sink + torch.randn(query_heads, generator=world.random)
    scales = (0.5, 1.5) if case.fp8 else (1.0, 1.0)
    scaling, layer = case.dim**-0.5, case.seed % LAYERS
    expected = paged_reference.decoded(
        world.slow, layer, query.cpu(), world.seen, scaling, softcap, sinks, scales,
        out.cpu(), lse.cpu(),
    )  # fmt: skip
    paged_decode(
        query, world.pool, world.tables, layer, world.blocks, world.seen.to(DEVICE), world.slots,
        out, lse, scratch, splits, scaling, softcap,
        None if sinks is None else sinks.to(DEVICE), *scales,
    )  # fmt: skip
    limit: Any = {"rtol": TOLERANCE[case.dtype], "atol": TOLERANCE[case.dtype]}
    torch.testing.assert_close(out.cpu().double(), expected[0], **limit)
    torch.testing.assert_close(lse.cpu().double(), expected[1], rtol=1e-4, atol=1e-3)


@given(cases(), st.integers(1, 9), st.booleans(), st.sampled_from([0.01, 1.0, 300.0]))
@examples(14)
def test_store(case: Case, width: int, noted: bool, size: float) -> None:
    """The last tokens of every row are written, in any order, beside padding."""
    world = World(case)
    query_heads = case.heads * case.group
    tokens = [(-1, 5)]
    for row, seen in enumerate(world.seen.tolist()):
        slot = int(world.slow.slots[row])
        least = -int(world.slow.shift[:, slot].min()) if case.lengths[row] else 0
        tokens += [(row, p) for p in range(max(0, least, seen - min(width, 4)), seen)]
    order = torch.randperm(len(tokens), generator=world.random).tolist()
    pairs = torch.tensor([tokens[i] for i in order], dtype=torch.int32)
    token_row, position = pairs.unbind(1)
    token_row, position = token_row.contiguous(), position.contiguous()
    many = len(tokens)
    key = world.random_like(many, case.heads, case.dim, dtype=case.dtype) * size
    value = world.random_like(many, case.heads, case.dim, dtype=case.dtype)
    query = world.random_like(many, query_heads, case.dim, dtype=case.dtype)
    # A request has a row of the ring of its own, and some have none.
    own = torch.arange(len(case.lengths) + 1, dtype=torch.int32)
    ring_row = torch.where(token_row % 2 == case.seed % 2, own[token_row], -1)
    shape = (len(own), width, query_heads, case.dim)
    ring = torch.zeros(shape, dtype=case.dtype)
    fast_ring = ring.to(DEVICE)
    scales, layer = (0.75, 1.25), case.seed % LAYERS
    paged_store(
        key, value, query, world.pool, world.tables, layer, world.blocks, world.slots,
        token_row.to(DEVICE), position.to(DEVICE), fast_ring if noted else None,
        ring_row.to(DEVICE) if noted else None, *scales,
    )  # fmt: skip
    paged_reference.store(
        world.slow, layer, key.cpu(), value.cpu(), token_row, position, scales
    )  # fmt: skip
    if noted:
        paged_reference.note(ring, query.cpu(), token_row, position, ring_row)
    assert torch.equal(fast_ring.cpu(), ring)
    found, expected = world._readable(case), world.slow.pages
    assert torch.equal(found.float(), expected.float())


def test_what_the_operators_say_of_themselves() -> None:
    """Which arguments they write, and that they need no data to be traced."""
    case = Case(3, (20, 0), (1, None), 2, 2, 32, 8, "BLHNC", torch.float32, False)
    world = World(case)
    query = world.random_like(2, 4, 32, dtype=case.dtype)
    runs = (world.tables.first, world.tables.shift, world.tables.plain, world.blocks)
    seen, pool = world.seen.to(DEVICE), world.pool
    out, lse = torch.zeros_like(query), torch.zeros(2, 4, device=DEVICE)
    scratch = torch.zeros(kernels.scratch_floats(2, 4, 32, 2), device=DEVICE)
    tests = ("test_schema", "test_faketensor")
    decode = (query, pool.data, *runs, seen, world.slots, None, out, lse, scratch, pool.strides)
    torch.library.opcheck(
        kernels.decode._decode, (*decode, 8, 1, 2, 0.2, 0.0, 1.0), test_utils=tests
    )  # fmt: skip
    key, row = query[:, :2], torch.arange(2, dtype=torch.int32, device=DEVICE)
    ring = torch.zeros(2, 4, 4, 32, device=DEVICE)
    stored = (key, key, query, pool.data, *runs, world.slots, row, seen - 1, ring, row)
    torch.library.opcheck(
        kernels.store._store, (*stored, pool.strides, 8, 1, 1.0, 1.0), test_utils=tests
    )  # fmt: skip


def test_every_rounding_to_fp8() -> None:
    """All float16 numbers: every code, what lies between two, what is too large."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = x.to(DEVICE).view(-1, 1, 2048)
    pages = torch.zeros(len(x) // 16 + 1, 1, 1, 16, 4096, dtype=torch.uint8, device=DEVICE)
    zero = torch.zeros(1, 1, 1, dtype=torch.int32, device=DEVICE)
    plain = torch.full((1,), PLAIN, dtype=torch.int32, device=DEVICE)
    places = torch.arange(len(x), dtype=torch.int32, device=DEVICE)
    blocks = torch.arange(1, len(pages), dtype=torch.int32, device=DEVICE)[None]
    paged_store(
        x, -x, x, Pool.of(pages), RunTables(zero, zero, plain), 0, blocks, zero[0, 0],
        torch.zeros_like(places), places,
    )  # fmt: skip
    wanted = torch.cat([x, -x], dim=2).float().clamp(-448, 448).to(E4M3).float()
    found = pages[1:].view(-1, 4096).view(E4M3).float()
    torch.testing.assert_close(found, wanted[:, 0], rtol=0, atol=0, equal_nan=True)
