"""Attention in C++ over runs that begin with coded pages against a slow one, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from examples import examples
from reasonalloc.ops.codes import KINDS, VALUE_KINDS, Field, RowFormat
from reasonalloc.ops.native import build, structs
from reasonalloc.ops.native.paged import (
    CodedPages,
    CodedRuns,
    Layout,
    PagedLoop,
    received,
)
from reasonalloc.ops.page_rows import PageRows

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
GUARD = 2  # pages before and behind the pool
HEADS = 2
CODED = st.one_of(st.integers(0, 300), st.sampled_from([0, 0, 1, 31, 255, 256, 257, 513, 600]))
TAILS = st.one_of(st.integers(1, 140), st.sampled_from([1, 16, 33, 257]))
SIZES = st.sampled_from([16, 32, 64, 512])
DIMS = st.sampled_from([16, 20, 24, 48, 80, 128])
PAIRS = st.tuples(st.sampled_from(list(KINDS)), st.sampled_from(VALUE_KINDS))
SINKS = st.sampled_from([None, 0.0, -100.0, 100.0])


@dataclass
class Made:
    """Runs of several layers: coded tokens, then others, with NaN wherever nothing is.

    Attributes:
        whole: [GUARD + pages + GUARD, page bytes] uint8, the pool and what lies around it.
        layout, keys, values: of the pool; ``keys`` and ``values`` are [pages, size, dim].
        coded: formats of the heads.
        table, lengths, held, begins: of the runs, see ``PagedLoop.begin``.
    """

    whole: Tensor
    layout: Layout
    keys: Tensor
    values: Tensor
    coded: CodedPages
    table: Tensor
    lengths: Tensor
    held: Tensor
    begins: Tensor
    before: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.before = self.whole.clone()

    @property
    def size(self) -> int:
        return self.keys.shape[1]

    def rows(self, layer: int, run: int) -> PageRows:
        return self.coded.rows[int(self.coded.of[layer, run % HEADS])]

    def place(self, layer: int, run: int, index: int) -> tuple[int, int]:
        """Page and slot of a token that is not coded."""
        at = int(self.begins[layer, run]) + index
        return int(self.table[layer, run, at // self.size]), at % self.size

    def places(self) -> Tensor:
        """[layers, runs] int64 of the last token of each run."""
        last = self.lengths.long() - 1
        page = self.table.long().gather(-1, last[..., None] // self.size)[..., 0]
        return page * self.size + last % self.size

    def decoded(self, layer: int, run: int) -> tuple[Tensor, Tensor]:
        """[coded tokens, dim] float32: keys and values."""
        rows, count = self.rows(layer, run), int(self.held[layer, run])
        pages, each = rows.view(self.whole[GUARD:]), rows.per_page
        own = [pages[int(self.table[layer, run, i // each]), i % each] for i in range(count)]
        if not own:
            return torch.zeros(0, self.keys.shape[2]), torch.zeros(0, self.keys.shape[2])
        keys, values = zip(*(rows.decode(row) for row in own), strict=True)
        return torch.stack(keys).float(), torch.stack(values).float()

    def run(self, layer: int, run: int) -> tuple[Tensor, Tensor]:
        """[tokens, dim] float32: keys and values of all tokens."""
        keys, values = ([x] for x in self.decoded(layer, run))
        for index in range(int(self.lengths[layer, run] - self.begins[layer, run])):
            page, slot = self.place(layer, run, index)
            keys.append(self.keys[page, slot][None].float())
            values.append(self.values[page, slot][None].float())
        return torch.cat(keys), torch.cat(values)

    def runs(self, layer: int, tokens: int) -> CodedRuns:
        """Those of a layer, as ``received`` takes them."""
        count = self.table.shape[1]
        of = self.coded.of[layer].repeat(count // HEADS)
        return CodedRuns(self.coded.rows, of, self.held[layer], self.begins[layer], tokens)


def made(
    seed: int,
    tokens: list[list[tuple[int, int]]],
    pairs: list[tuple[str, str]],
    size: int,
    dim: int,
    dtype: torch.dtype,
    turned: bool,
) -> Made:
    """Runs of [layers][runs] coded and other tokens, in heads of ``pairs`` by chance."""
    generator = torch.Generator().manual_seed(seed)
    page_bytes = 2 * size * dim * dtype.itemsize
    forms = [RowFormat(*(Field(kind, dim, dtype) for kind in pair)) for pair in pairs]
    rows = tuple(PageRows(form, seed % 3, page_bytes) for form in forms)
    layers, runs = len(tokens), len(tokens[0])
    of = torch.randint(0, len(rows), (layers, HEADS), generator=generator).int()
    both = torch.tensor(tokens)
    held, tails = (x.int() for x in both.unbind(-1))
    begins, columns = torch.zeros_like(held), 0
    for layer in range(layers):
        for run in range(runs):
            pages = rows[of[layer, run % HEADS]].pages(int(held[layer, run]))
            begins[layer, run] = pages * size
            columns = max(columns, pages - int(-tails[layer, run] // size))
    pages = 1 + layers * runs * columns
    whole = torch.full((GUARD + pages + GUARD, page_bytes), 255, dtype=torch.uint8)
    memory = whole[GUARD : GUARD + pages].view(dtype).view(pages, 2, size, dim)
    keys = memory[:, 0]
    if turned:
        keys = keys.view(pages, dim, size).transpose(1, 2)
    layout = Layout.of(memory, keys, memory[:, 1])
    assert layout is not None and layout.turned == turned
    order = 1 + torch.randperm(pages - 1, generator=generator).int()
    pool = Made(
        whole,
        layout,
        keys,
        memory[:, 1],
        CodedPages(rows, of),
        order.view(layers, runs, columns).contiguous(),
        begins + tails,
        held,
        begins,
    )
    for layer in range(layers):
        for run in range(runs):
            own, count = pool.rows(layer, run), int(held[layer, run])
            vectors = torch.randn(2, count, dim, generator=generator).to(dtype)
            beside = torch.arange(count), torch.full((count, own.channels), torch.nan)
            views = own.view(whole[GUARD:])
            for i, row in enumerate(own.encode(*vectors, *beside)):
                page = int(pool.table[layer, run, i // own.per_page])
                views[page, i % own.per_page] = row
            for i in range(int(tails[layer, run])):
                page, slot = pool.place(layer, run, i)
                for stored in (pool.keys, pool.values):
                    stored[page, slot] = torch.randn(dim, generator=generator).to(dtype)
    pool.before = whole.clone()
    return pool


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


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Any:
    """More threads than runs, and fewer."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@given(
    st.integers(0, 10**6),
    st.integers(1, 2).flatmap(
        lambda requests: st.lists(
            st.lists(st.tuples(CODED, TAILS), min_size=HEADS * requests, max_size=HEADS * requests),
            min_size=1,
            max_size=3,
        )
    ),
    st.lists(PAIRS, min_size=1, max_size=4),
    st.integers(1, 8),
    SIZES,
    DIMS,
    st.sampled_from([0.0, 2.0]),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
    SINKS,
)
@examples(40)
def test_a_step_is_the_reference(
    seed: int,
    tokens: list[list[tuple[int, int]]],
    pairs: list[tuple[str, str]],
    group: int,
    size: int,
    dim: int,
    softcap: float,
    dtype: torch.dtype,
    turned: bool,
    sink: float | None,
) -> None:
    torch.manual_seed(seed)
    pool = made(seed, tokens, pairs, size, dim, dtype, turned)
    requests = len(tokens[0]) // HEADS
    loop = PagedLoop(pool.layout, group, HEADS, 0.3, softcap, pool.coded)
    noted = (torch.tensor([requests - 1]), torch.tensor([2]), torch.tensor([4]))
    ring = torch.zeros(3, 5, HEADS * group, dim, dtype=dtype)
    places = pool.places()
    loop.begin(
        pool.table, pool.lengths, places, noted if seed % 2 else None, pool.held, pool.begins
    )
    sinks = None if sink is None else sink + torch.randn(HEADS, group)
    # As vLLM passes them: slices of one projection.
    whole = torch.randn(requests, (group + 2) * HEADS * dim).to(dtype)
    split = [group * HEADS * dim, HEADS * dim, HEADS * dim]
    query, key, value = (x.view(requests, -1, dim) for x in whole.split(split, dim=1))
    expected_pool = replace(pool, whole=pool.whole.clone())
    memory = expected_pool.whole[GUARD:-GUARD].view(dtype).view(pool.layout.memory.shape)
    stored_keys = memory[:, 0]
    if turned:
        stored_keys = stored_keys.view(-1, dim, size).transpose(1, 2)
    for layer in range(len(tokens)):
        out = torch.full((requests, HEADS * group, dim), torch.nan, dtype=dtype)
        loop.attend(layer, query, key, value, out, ring if seed % 2 else None, sinks)
        for stored, new in ((stored_keys, key), (memory[:, 1], value)):
            for at, vector in zip(places[layer].tolist(), new.flatten(0, 1), strict=True):
                stored[at // size, at % size] = vector
        assert torch.equal(pool.whole, expected_pool.whole)
        for run in range(requests * HEADS):
            b, h = divmod(run, HEADS)
            heads = slice(h * group, (h + 1) * group)
            keys, values = pool.run(layer, run)
            own = None if sinks is None else sinks[h]
            expected = slow(query[b, heads], keys, 0.3, softcap, own) @ values.double()
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(
                out[b, heads].double(), expected, rtol=tolerance, atol=tolerance
            )
    expected_ring = torch.zeros_like(ring)
    if seed % 2:
        expected_ring[2, 4] = query[-1]
    assert torch.equal(ring, expected_ring)


@pytest.mark.parametrize("turned", [False, True])
def test_without_coded_tokens_it_is_the_plain_loop(turned: bool) -> None:
    """To the last bit: with formats that nobody has, and where a later step has none."""
    tokens = [[(0, 70), (0, 1), (0, 300), (0, 33)]]
    pool = made(3, tokens, [("int8", "int4")], 32, 48, torch.bfloat16, turned)
    query, key = torch.randn(2, 6, 48).bfloat16(), torch.randn(2, 2, 48).bfloat16()
    plain = PagedLoop(pool.layout, 3, HEADS, 0.3, 0.0)
    coded = PagedLoop(pool.layout, 3, HEADS, 0.3, 0.0, pool.coded)
    begun = (pool.table, pool.lengths, pool.places(), None)
    results = []
    for loop, runs in ((plain, ()), (coded, (pool.held, pool.begins)), (coded, ())):
        loop.begin(*begun, *runs)
        results.append(torch.empty(2, 6, 48, dtype=torch.bfloat16))
        loop.attend(0, query, key, key, results[-1], None, None)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.usefixtures("threads")
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(CODED, st.one_of(TAILS, st.just(0))), min_size=2, max_size=2),
    st.lists(PAIRS, min_size=1, max_size=2),
    st.integers(1, 5),
    st.integers(1, 20),
    SIZES,
    DIMS,
    st.sampled_from([None, 2.0]),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
    SINKS,
)
@examples(40)
def test_what_tokens_received_is_the_reference(
    seed: int,
    tokens: list[tuple[int, int]],
    pairs: list[tuple[str, str]],
    group: int,
    asked: int,
    size: int,
    dim: int,
    softcap: float | None,
    dtype: torch.dtype,
    turned: bool,
    sink: float | None,
) -> None:
    """Of queries that see some of the coded tokens, all of them, or others as well."""
    torch.manual_seed(seed)
    pool = made(seed, [tokens], pairs, size, dim, dtype, turned)
    queries = 0.3 * torch.randn(2, group, asked, dim)
    most = torch.tensor(tokens).sum(dim=1).int()[:, None]
    back = torch.arange(asked - 1, -1, -1, dtype=torch.int32) * (1 + seed % 30)
    visible = (most - back).clamp_min(0).int()
    visible[:, seed % asked] = 0
    sinks = None if sink is None else sink + torch.randn(2, group)
    runs = pool.runs(0, int(most.max()) + seed % 3)
    found = received(pool.layout, queries, pool.table[0], visible, softcap, sinks, runs)
    assert found.shape == (2, asked, runs.tokens) and torch.equal(pool.whole, pool.before)
    for run in range(2):
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


def small(size: int = 32) -> Made:
    """One request of a layer."""
    pairs = [("int8", "int4"), ("int4h", "fp8")]
    return made(5, [[(130, 20), (3, 40)]], pairs, size, 16, torch.float32, True)


def attend(pool: Made) -> None:
    query, key = torch.zeros(1, HEADS, 16), torch.zeros(1, HEADS, 16)
    loop = PagedLoop(pool.layout, 1, HEADS, 1.0, 0.0, pool.coded)
    loop.begin(pool.table, pool.lengths, pool.places(), None, pool.held, pool.begins)
    loop.attend(0, query, key, key, torch.empty_like(query), None, None)


def ask(pool: Made) -> None:
    visible = torch.tensor([[150], [43]], dtype=torch.int32)
    runs = pool.runs(0, 150)
    received(pool.layout, torch.zeros(2, 1, 1, 16), pool.table[0], visible, None, None, runs)


Fault = tuple[str, Callable[[Made], None]]


def put(name: str, run: int, value: int) -> Fault:
    """A number of a run that is another one."""

    def change(pool: Made) -> None:
        getattr(pool, name)[0, run] = value

    return f"{name}-{run}-{value}", change


def page(column: int, value: int) -> Fault:
    """A page of run 0 that is another one."""

    def change(pool: Made) -> None:
        pool.table[0, 0, column] = value

    return f"page-{column}-{value}", change


def form(value: int) -> Fault:
    def change(pool: Made) -> None:
        pool.coded.of[0, 1] = value

    return f"format-{value}", change


TOO_MANY = 2**31 - 1
OUTSIDE: list[Fault] = [
    *(put("held", run, value) for run in (0, 1) for value in (-1, TOO_MANY)),
    put("held", 0, 1),  # fewer pages than begins says
    put("held", 1, 0),
    *(put("begins", 0, value) for value in (-32, 0, 33, 640, TOO_MANY)),
    *(form(value) for value in (-1, 2, TOO_MANY)),
    *(page(column, value) for column in (0, 1) for value in (-1, 10**6, TOO_MANY)),
]


@pytest.mark.parametrize(("name", "change"), OUTSIDE)
def test_what_lies_outside_is_refused(name: str, change: Callable[[Made], None]) -> None:
    for act in (attend, ask):
        pool = small()
        act(pool)
        change(pool)
        if act is attend:  # the new tokens lie where they did
            pool.places = small().places  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="outside of the storage"):
            act(pool)
        assert torch.equal(pool.whole[:GUARD], pool.before[:GUARD])
        assert torch.equal(pool.whole[-GUARD:], pool.before[-GUARD:])


def test_more_places_than_a_run_has_are_refused() -> None:
    pool = small()
    pool.places = small().places  # type: ignore[method-assign]
    for length in (int(pool.begins[0, 0]) - 1, 32 * pool.table.shape[2] + 1, -1):
        pool.lengths[0, 0] = length
        with pytest.raises(RuntimeError, match="outside of the storage"):
            attend(pool)


@pytest.mark.parametrize("visible", [-1, 151, 129 + 32 * 40])
def test_queries_that_see_more_than_there_is(visible: int) -> None:
    pool = small()
    sees = torch.tensor([[visible], [0]], dtype=torch.int32)
    query = torch.zeros(2, 1, 1, 16)
    for tokens in (150, 10**4):
        if visible == 151 and tokens > 151:
            continue  # places behind the end of a run are in its page
        with pytest.raises(RuntimeError, match="outside of the storage"):
            received(pool.layout, query, pool.table[0], sees, None, None, pool.runs(0, tokens))


def test_runs_that_no_query_asks_need_not_be_there() -> None:
    """Of padding nothing is read."""
    pool = small()
    pool.table.fill_(-1)
    runs = replace(pool.runs(0, 10), of=torch.full((2,), 9, dtype=torch.int32))
    sees = torch.zeros(2, 3, dtype=torch.int32)
    found = received(pool.layout, torch.zeros(2, 1, 3, 16), pool.table[0], sees, None, None, runs)
    assert not bool(found.any())


PAGE = 2 * 32 * 16 * 4
KEY, VALUE = Field("int8", 16, torch.float32), Field("auto", 16, torch.float32)


@pytest.mark.parametrize(
    "rows",
    [
        PageRows(RowFormat(KEY, VALUE), 0, PAGE // 2),
        PageRows(RowFormat(KEY, VALUE), PAGE, PAGE),
        PageRows(RowFormat(KEY, VALUE), -4, PAGE),
        PageRows(RowFormat(replace(KEY, dim=14), VALUE), 0, PAGE),
        PageRows(RowFormat(KEY, replace(VALUE, dtype=torch.bfloat16)), 0, PAGE),
        PageRows(RowFormat(KEY, replace(VALUE, kind="int4h")), 0, PAGE),
        PageRows(RowFormat(replace(KEY, kind="int2"), VALUE), 0, PAGE),
    ],
)
def test_rows_of_other_pages_are_refused(rows: PageRows) -> None:
    pool = small()
    wrong = CodedPages((pool.coded.rows[0], rows), pool.coded.of)
    runs = replace(pool.runs(0, 150), rows=wrong.rows)
    sees = torch.zeros(2, 1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"rows\[1\] cannot lie in pages"):
        PagedLoop(pool.layout, 1, HEADS, 1.0, 0.0, wrong)
    with pytest.raises(RuntimeError, match=r"rows\[1\] cannot lie in pages"):
        received(pool.layout, torch.zeros(2, 1, 1, 16), pool.table[0], sees, None, None, runs)


def test_int4_in_odd_vectors_is_refused() -> None:
    memory = torch.zeros(3, 2, 16, 7)
    layout = Layout.of(memory, memory[:, 0], memory[:, 1])
    assert layout is not None
    rows = PageRows(RowFormat(*[Field("int4", 7, torch.float32)] * 2), 0, 2 * 16 * 7 * 4)
    with pytest.raises(RuntimeError, match="cannot lie in pages"):
        PagedLoop(layout, 1, 1, 1.0, 0.0, CodedPages((rows,), torch.zeros(1, 1).int()))


def test_arguments_that_are_not_so() -> None:
    pool = small()
    begun = (pool.table, pool.lengths, pool.places(), None)
    loop = PagedLoop(pool.layout, 1, HEADS, 1.0, 0.0, pool.coded)
    plain = PagedLoop(pool.layout, 1, HEADS, 1.0, 0.0)
    for one in ((pool.held, None), (None, pool.begins)):
        with pytest.raises(RuntimeError, match="go together"):
            loop.begin(*begun, *one)
    with pytest.raises(RuntimeError, match="made for none"):
        plain.begin(*begun, pool.held, pool.begins)
    for wrong in (pool.held.long(), pool.held[:, :1], pool.held.repeat(2, 1)):
        with pytest.raises(RuntimeError, match=r"^coded cannot be handed"):
            loop.begin(*begun, wrong, pool.begins)
        with pytest.raises(RuntimeError, match=r"^starts_of_tails cannot be handed"):
            loop.begin(*begun, pool.held, wrong)
    for of in (pool.coded.of.long(), pool.coded.of[:, :1], pool.coded.of.repeat(1, 2)[:, ::2]):
        with pytest.raises(RuntimeError, match=r"^of cannot be handed"):
            PagedLoop(pool.layout, 1, HEADS, 1.0, 0.0, replace(pool.coded, of=of))
    # Of other layers than there are.
    other = replace(pool.coded, of=pool.coded.of.repeat(2, 1))
    loop = PagedLoop(pool.layout, 1, HEADS, 1.0, 0.0, other)
    with pytest.raises(RuntimeError, match=r"^of cannot be handed"):
        loop.begin(*begun, pool.held, pool.begins)
    runs = pool.runs(0, 150)
    for name in ("of", "lengths", "begins"):
        with pytest.raises(RuntimeError, match=rf"^{name} cannot be handed"):
            ask_with = replace(runs, **{name: getattr(runs, name).long()})
            sees = torch.zeros(2, 1, dtype=torch.int32)
            received(
                pool.layout, torch.zeros(2, 1, 1, 16), pool.table[0], sees, None, None, ask_with
            )


def test_structures_are_compared_where_the_loops_are_loaded() -> None:
    with pytest.raises(RuntimeError, match=r"PagePool has \d+ bytes in C"):
        structs.check_size(build.library(), "received", structs.PagePool)
