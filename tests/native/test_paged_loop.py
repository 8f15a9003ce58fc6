"""Attention over pages in C++ against a slow one, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from examples import examples
from reasonalloc.ops.native.paged import Layout, PagedLoop, move_tokens, received

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SIZES = st.sampled_from([16, 32, 64, 512])
LENGTHS = st.one_of(st.integers(1, 300), st.sampled_from([1, 16, 31, 32, 33, 256, 257, 511, 600]))


@dataclass
class Made:
    """Runs of several layers in one pool: ``keys`` and ``values`` are views of it."""

    layout: Layout
    keys: Tensor
    values: Tensor
    table: Tensor
    lengths: Tensor

    def places(self) -> Tensor:
        """Of the last token of each run."""
        size = self.keys.shape[1]
        last = self.lengths.long() - 1
        page = self.table.long().gather(-1, last[..., None] // size)[..., 0]
        return page * size + last % size

    def run(self, layer: int, run: int) -> tuple[Tensor, Tensor]:
        """[tokens, dim] float32: its keys and values."""
        pages, count = self.table[layer, run].long(), int(self.lengths[layer, run])
        return tuple(x[pages].flatten(0, 1)[:count].float() for x in (self.keys, self.values))


def made(
    seed: int, lengths: list[list[int]], size: int, dim: int, dtype: torch.dtype, turned: bool
) -> Made:
    torch.manual_seed(seed)
    counts = torch.tensor(lengths, dtype=torch.int32)
    columns = -(-int(counts.max()) // size)
    pages = 1 + counts.numel() * columns
    memory = torch.randn(pages, 2, size, dim).to(dtype)
    plain = memory[:, 0]
    keys = plain.view(pages, dim, size).transpose(1, 2) if turned else plain
    order = 1 + torch.randperm(pages - 1).int()
    table = order.view(*counts.shape, columns).contiguous()
    layout = Layout.of(memory, keys, memory[:, 1])
    assert layout is not None and layout.turned == turned
    return Made(layout, keys, memory[:, 1], table, counts)


def slow(
    query: Tensor, keys: Tensor, scaling: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """[group, n] weights of queries [group, dim], the sinks' left out."""
    logits = scaling * query.double() @ keys.double().T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[:, None]], dim=1)
    return logits.softmax(dim=1)[:, : len(keys)]


@given(
    st.integers(0, 10**6),
    st.integers(1, 2).flatmap(
        lambda requests: st.lists(
            st.lists(LENGTHS, min_size=2 * requests, max_size=2 * requests), min_size=1, max_size=2
        )
    ),
    st.integers(1, 6),
    SIZES,
    st.sampled_from([8, 20, 32, 80]),
    st.sampled_from([0.0, 2.0]),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
    st.sampled_from([None, 0.0, -100.0, 100.0]),
    st.booleans(),
)
@examples(60)
def test_a_step_is_the_reference(
    seed: int,
    lengths: list[list[int]],
    group: int,
    size: int,
    dim: int,
    softcap: float,
    dtype: torch.dtype,
    turned: bool,
    sink: float | None,
    threads: bool,
) -> None:
    pool = made(seed, lengths, size, dim, dtype, turned)
    heads, requests = 2, len(lengths[0]) // 2
    before = [t.clone() for t in (pool.keys, pool.values)]
    loop = PagedLoop(pool.layout, group, heads, 0.3, softcap)
    noted = (torch.tensor([requests - 1]), torch.tensor([2]), torch.tensor([4]))
    ring = torch.zeros(3, 5, heads * group, dim, dtype=dtype)
    places = pool.places()
    loop.begin(pool.table, pool.lengths, places, noted if seed % 2 else None)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(3 if threads else 1)
    sinks = None if sink is None else sink + torch.randn(heads, group)
    # As vLLM passes them: slices of one projection.
    whole = torch.randn(requests, (group + 2) * heads * dim).to(dtype)
    split = [group * heads * dim, heads * dim, heads * dim]
    query, key, value = (x.view(requests, -1, dim) for x in whole.split(split, dim=1))
    for layer in range(len(lengths)):
        out = torch.full((requests, heads * group, dim), torch.nan, dtype=dtype)
        loop.attend(layer, query, key, value, out, ring if seed % 2 else None, sinks)
        for stored, new, old in ((pool.keys, key, before[0]), (pool.values, value, before[1])):
            for at, vector in zip(places[layer].tolist(), new.flatten(0, 1), strict=True):
                old[at // size, at % size] = vector
            assert torch.equal(stored, old)
        for run in range(requests * heads):
            b, h = divmod(run, heads)
            own = query[b, h * group : (h + 1) * group]
            keys, values = pool.run(layer, run)
            weights = slow(own, keys, 0.3, softcap, None if sinks is None else sinks[h])
            expected = weights @ values.double()
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(
                out[b, h * group : (h + 1) * group].double(),
                expected,
                rtol=tolerance,
                atol=tolerance,
            )
    torch.set_num_threads(threads_before)
    expected_ring = torch.zeros_like(ring)
    if seed % 2:
        expected_ring[2, 4] = query[-1]
    assert torch.equal(ring, expected_ring)


@given(
    st.integers(0, 10**6),
    st.lists(LENGTHS, min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(1, 20),
    SIZES,
    st.sampled_from([8, 20, 64]),
    st.sampled_from([None, 2.0]),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
    st.sampled_from([None, 0.0, -100.0, 100.0]),
)
@examples(60)
def test_what_tokens_received_is_the_reference(
    seed: int,
    lengths: list[int],
    group: int,
    asked: int,
    size: int,
    dim: int,
    softcap: float | None,
    dtype: torch.dtype,
    turned: bool,
    sink: float | None,
) -> None:
    pool = made(seed, [lengths], size, dim, dtype, turned)
    queries = 0.3 * torch.randn(len(lengths), group, asked, dim)
    # Queries see more from one to the next, those that are none see nothing.
    most = pool.lengths[0][:, None]
    visible = (most - torch.arange(asked - 1, -1, -1, dtype=torch.int32)).clamp_min(0)
    visible[:, seed % asked] = 0
    sinks = None if sink is None else sink + torch.randn(len(lengths), group)
    found = received(pool.layout, queries, pool.table[0], visible.contiguous(), softcap, sinks)
    assert found.shape == (len(lengths), asked, pool.table.shape[2] * size)
    for run in range(len(lengths)):
        keys, _ = pool.run(0, run)
        for index in range(asked):
            count = int(visible[run, index])
            assert not bool(found[run, index, count:].any())
            if count:
                own = None if sinks is None else sinks[run]
                weights = slow(queries[run, :, index], keys[:count], 1.0, softcap or 0.0, own)
                torch.testing.assert_close(
                    found[run, index, :count].double(), weights.mean(dim=0), rtol=1e-4, atol=1e-5
                )


@given(
    st.integers(0, 10**6),
    SIZES,
    st.sampled_from([8, 20, 32]),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
    st.integers(0, 60),
)
@examples(30)
def test_tokens_change_places(
    seed: int, size: int, dim: int, dtype: torch.dtype, turned: bool, count: int
) -> None:
    """As by indexing, also where places are both read and written; nothing goes to place 0."""
    pool = made(seed, [[200, 90]], size, dim, dtype, turned)
    slots = len(pool.keys) * size
    source = torch.randint(size, slots, (count,))
    target = torch.randperm(slots - size)[:count] + size
    target[seed % 3 :: 5] = 0
    expected = []
    for stored in (pool.keys, pool.values):
        flat = stored.clone().reshape(slots, dim)
        flat[target] = flat[source]
        expected.append(flat)
    move_tokens(pool.layout, source, target)
    for stored, flat in zip((pool.keys, pool.values), expected, strict=True):
        assert torch.equal(stored.reshape(slots, dim)[size:], flat[size:])
    with pytest.raises(RuntimeError, match="outside"):
        move_tokens(pool.layout, torch.tensor([slots]), torch.tensor([1]))


def test_pools_that_the_loops_cannot_read() -> None:
    memory = torch.zeros(3, 2, 32, 8)
    keys, values = memory[:, 0], memory[:, 1]
    assert Layout.of(memory, keys, values) is not None
    assert Layout.of(memory, keys.transpose(1, 2), values) is None
    assert Layout.of(memory.double(), keys, values) is None
    for size in (8, 48):
        other = torch.zeros(3, 2, size, 8)
        assert Layout.of(other, other[:, 0], other[:, 1]) is None


@pytest.mark.parametrize("fault", ["page", "negative", "length", "place", "row", "runs", "type"])
def test_what_lies_outside_is_refused(fault: str) -> None:
    pool = made(0, [[40, 20]], 32, 8, torch.float32, True)
    loop = PagedLoop(pool.layout, 1, 2, 1.0, 0.0)
    places, rows = pool.places(), torch.tensor([0])
    query = torch.zeros(1, 2, 8)
    if fault == "page":
        pool.table[0, 1, 0] = len(pool.keys)
    elif fault == "negative":
        pool.table[0, 0, 1] = -1
    elif fault == "length":
        pool.lengths[0, 0] = 65
    elif fault == "place":
        places[0, 1] = len(pool.keys) * 32
    elif fault == "row":
        rows[0] = 3
    elif fault == "type":
        query = query.double()
    ring = torch.zeros(3, 4, 2, 8)
    noted = (torch.tensor([0]), rows, torch.tensor([0]))
    with pytest.raises(RuntimeError, match=r"outside|KV heads|cannot be handed"):
        if fault == "runs":
            loop.begin(pool.table[:, :1], pool.lengths[:, :1], places[:, :1], noted)
        loop.begin(pool.table, pool.lengths, places, noted)
        loop.attend(0, query, query, query, torch.empty(1, 2, 8), ring, None)
