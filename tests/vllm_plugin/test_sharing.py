"""Evicted prompts that requests share: nobody is preempted, all finish; without vLLM."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from itertools import takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_admission import SMALL, Asked, Engine, Sanguine, drops, engines, peak

from reasonalloc.integrations.vllm.admission import Admission
from reasonalloc.integrations.vllm.coding import Share
from reasonalloc.integrations.vllm.layout import Coded, Reserve, make_layouts


@dataclass
class Sharing(Engine):
    """The same with a prefix cache, block by block, as the block manager does it.

    Attributes:
        alike: tokens that all prompts begin with.
    """

    alike: int = 0
    rows: dict[str, list[int]] = field(default_factory=dict)
    sides: dict[str, list[int]] = field(default_factory=dict)  # of windows, shared by nobody
    before: dict[str, int] = field(default_factory=dict)
    refs: Counter[int] = field(default_factory=Counter)
    hashes: dict[int, tuple[str, int]] = field(default_factory=dict)  # of blocks
    computed: int = 0
    lost: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.admission = Admission(self.reserve, self.pool, self.answers, self)
        self.free = list(range(1, self.pool + 1))  # the next one last

    def shared(self, name: str) -> int:
        row = self.rows[name]
        return max((n + 1 for n, block in enumerate(row) if self.refs[block] > 1), default=0)

    def prefix(self, name: str) -> list[int]:
        most = self.reserve.most_shared(self.asked[name].prompt, self.pool)
        return [*takewhile(bool, self.rows[name][:most])]

    def hash(self, name: str, index: int) -> tuple[str, int]:
        whole = (index + 1) * self.reserve.block_size <= self.alike
        return ("" if whole else name, index)

    def find(self, name: str) -> list[int]:
        cap = self.reserve.most_cached(self.asked[name].prompt, self.pool)
        # Of blocks that hold the same, vLLM finds the first that was cached.
        blocks = {found: block for block, found in reversed(self.hashes.items())}
        found: list[int] = []
        for index in range(cap // self.reserve.block_size):
            if (block := blocks.get(self.hash(name, index))) is None:
                break
            found.append(block)
        return found

    def can_admit(self, name: str) -> bool:
        found = self.find(name)
        held = (n + 1 for n, block in enumerate(found) if self.refs[block])
        return self.admission.can_admit(name, found[: max(held, default=0)])

    def cached(self, name: str) -> int:
        self.rows[name] = self.find(name)
        for block in self.rows[name]:
            if not self.refs[block]:
                self.free.remove(block)
            self.refs[block] += 1
        return len(self.rows[name]) * self.reserve.block_size

    def give_back(self, blocks: list[int]) -> None:
        for block in reversed([block for block in blocks if block]):
            self.refs[block] -= 1
            if not self.refs[block]:
                self.free.insert(0 if block in self.hashes else len(self.free), block)

    def new_block(self) -> int:
        assert self.free, "a request would be preempted"
        block = self.free.pop()
        assert not self.refs[block]
        self.refs[block] = 1
        self.hashes.pop(block, None)
        return block

    def take_beside(self, name: str, start: int, tokens: int, processed: int) -> None:
        if processed >= start and self.rows[name]:
            self.admission.prefilled(name)
        count, side = self.in_windows(tokens, processed), self.sides.setdefault(name, [])
        self.give_back(side[count:])
        side[:] = [*side[:count], *(self.new_block() for _ in range(count - len(side)))]

    def take(self, name: str, tokens: int) -> None:
        reserve, row = self.reserve, self.rows[name]
        start = self.admission.start(name)
        first = reserve.first_event(start)
        flying = sum(step.get(name, 0) for step in self.pipeline)
        if name in self.before and self.tokens[name] - flying >= first:
            stay, before = reserve.leading(start), self.before[name]
            gone = row[stay:before]
            row[stay:before] = [0] * len(gone)
            self.give_back(gone)
            self.before[name] = stay
            self.admission.settle(name)
        self.take_beside(name, start, tokens, self.tokens[name] - flying)
        needed = reserve.needed(start, tokens)
        most = reserve.most_shared(start, self.pool)
        if tokens == first and name not in self.before:
            needed = reserve.needed(start, tokens, self.shared(name))
            if (wanted := reserve.needed(start, tokens, most)) > needed:
                needed = max(needed, self.admission.extend(name, wanted))
            before = self.before[name] = needed - reserve.own(start)
            assert all(self.refs[block] == 1 for block in row[before:])
            self.lost += max(start // reserve.block_size - before, 0)
            for block in row[before:]:
                self.hashes.pop(block, None)
        while len(row) < needed:
            row.append(self.new_block())
        stay = min(min(tokens, start) // reserve.block_size, most, self.before.get(name, most))
        for index, block in enumerate(row[:stay]):
            if block and block not in self.hashes:
                self.hashes[block] = self.hash(name, index)
        self.computed += max(min(tokens, start) - self.tokens[name], 0)
        promised = sum(each.blocks for each in self.admission._admitted.values())
        assert promised - sum(self.admission._held_twice()) <= self.pool

    def drop(self, name: str) -> None:
        super().drop(name)
        self.before.pop(name, None)
        self.give_back(self.rows.pop(name, []) + self.sides.pop(name, []))

    def serve(self, requests: dict[str, Asked], drops: dict[int, str] | None = None) -> None:
        super().serve(requests, drops)
        assert sorted(self.free) == list(range(1, self.pool + 1))


def in_bits(reserve: Reserve, per_page: int | None) -> Reserve:
    """With older tokens coded, ``per_page`` pinned ones to a block; None: as it is."""
    if per_page is None:
        return reserve
    coded = Coded(1, reserve.blocks, ((Share(0, 1, per_page), 1),))
    return dataclasses.replace(reserve, coded=(coded,))


PER_PAGE = st.none() | st.sampled_from([1, 3, 20])


def sharing(
    engine: Engine, alike: int, observed: int, pin: bool = False, per_page: int | None = None
) -> Sharing:
    given = {f.name: getattr(engine, f.name) for f in dataclasses.fields(engine) if f.init}
    reserve = dataclasses.replace(engine.reserve, observed=observed, pin=pin)
    reserve = in_bits(reserve, per_page)
    names = ("pool", "chunk", "ahead", "seqs", "answers")
    return Sharing(reserve, alike=alike, **{name: given[name] for name in names})


@given(engines(), st.integers(0, 80), st.integers(0, 4), st.data())
def test_every_request_finishes_without_preemption(
    made: tuple[Engine, dict[str, Asked]], alike: int, observed: int, data: st.DataObject
) -> None:
    engine, requests = made  # the pool holds each of them if it shares nothing
    sharing(engine, alike, observed).serve(requests, data.draw(drops(requests)))


@given(engines(), st.integers(0, 80), st.integers(0, 50), st.booleans(), PER_PAGE, st.data())
def test_every_request_finishes_pinned_or_in_fewer_bits(
    made: tuple[Engine, dict[str, Asked]],
    alike: int,
    more: int,
    pin: bool,
    per_page: int | None,
    data: st.DataObject,
) -> None:
    engine, requests = made
    shared = sharing(engine, alike, 0, pin, per_page)
    pool = more + max(peak(shared.reserve, request) for request in requests.values())
    dataclasses.replace(shared, pool=pool).serve(requests, data.draw(drops(requests)))


@given(engines(), st.integers(0, 80))
def test_where_there_is_room_nothing_leaves_the_cache(
    made: tuple[Engine, dict[str, Asked]], alike: int
) -> None:
    engine, requests = made
    engine.pool = len(requests) * max(
        engine.reserve.peak(r.prompt, r.prompt + r.allowed, r.prompt)
        + engine.reserve.windows.peak(r.prompt, r.prompt + r.allowed)
        for r in requests.values()
    )
    engine.ahead, engine.seqs = 1, 100
    shared = sharing(engine, alike, 0)
    shared.serve(requests)
    assert (shared.lost, shared.pauses) == (0, 0)


@pytest.mark.parametrize("peaks", [1.0, 1.5, 2.3, 4.0])
@pytest.mark.parametrize("ahead", [1, 2])
def test_nothing_stands_still_in_a_pool_that_is_far_too_small(peaks: float, ahead: int) -> None:
    pool = int(peaks * SMALL.peak(150, 400))
    engine = Engine(SMALL, pool, chunk=50, ahead=ahead, answers=Sanguine())
    shared = sharing(engine, 40, 4)
    prompts = [3, 40, 9, 150, 1, 77]
    shared.serve({str(i): Asked(prompts[i % 6], 60 + 7 * i, 400) for i in range(40)})
    assert shared.pauses > 0


POOL = make_layouts([[2 * 96] * 4], 2, 64, 32)[0].reserve


def test_as_many_run_at_once_as_without_sharing() -> None:
    """24 requests of 900 tokens in 6 MiB: 96 blocks, of which one is vLLM's own."""
    requests = {str(i): Asked(100, 800, 800) for i in range(24)}
    plain = Engine(POOL, 95)
    plain.serve(requests)
    shared = sharing(Engine(POOL, 95), 0, 8)
    shared.serve(requests)
    assert shared.steps <= min(plain.steps, 1600)


def test_a_system_prompt_is_computed_once() -> None:
    shared = sharing(Engine(POOL, 1000), 512, 8)
    shared.serve({str(i): Asked(512 + i + 8, 50, 100) for i in range(16)})
    assert shared.computed == 512 + sum(i + 8 for i in range(16))


@pytest.mark.parametrize("pin", [True, False])
def test_a_prompt_that_all_share_takes_its_room_once(pin: bool) -> None:
    prompt, answer, requests = 32 * 30, 100, 16
    shared = sharing(Engine(POOL, 30 + requests * POOL.blocks), prompt, 8, pin)
    # Something that fits is in the cache before the others come.
    shared.serve({"first": Asked(prompt + 5, 1, 1)})
    shared.serve({str(i): Asked(prompt + 5, answer, answer) for i in range(requests)})
    assert (shared.most, shared.pauses) == (requests, 0)


@st.composite
def reserves(draw: st.DrawFn) -> Reserve:
    heads = draw(st.integers(1, 3))
    total, size = draw(st.integers(heads * 4, heads * 60)), draw(st.sampled_from([1, 4, 16]))
    interval, observed = draw(st.integers(1, 40)), draw(st.none() | st.integers(0, 4))
    layout = make_layouts([[total]], heads, interval, size, draw(st.booleans()), observed=observed)
    return in_bits(layout[0].reserve, draw(PER_PAGE))


@given(reserves(), st.integers(1, 300), st.integers(1, 200))
def test_what_is_shared_and_what_is_needed_then(reserve: Reserve, start: int, pool: int) -> None:
    size, first = reserve.block_size, reserve.first_event(start)
    shared = reserve.most_shared(start, pool)
    cached = reserve.most_cached(start, pool)
    assert shared <= start // size
    assert cached < start
    if reserve.stays:
        assert (shared, cached) == (start // size, start - 1)
        assert reserve.needed(start, first, shared) == reserve.needed(start, first)
        return
    if not reserve.pin:
        if reserve.observed is None:
            assert shared == cached == 0
            return
        assert cached <= max(first - reserve.observed, 0)
    assert cached // size <= shared
    # Whatever the pool holds that shares nothing, it holds sharing.
    alone = reserve.peak(start, start + 1000)
    if alone <= pool:
        assert alone <= reserve.peak(start, start + 1000, shared) <= pool
    # The last blocks are free to be written: those before them hold all that is shared.
    assert reserve.needed(start, first, shared) - reserve.own(start) >= shared


@dataclass
class Texts(Sharing):
    """Prompts that begin alike in several ways; some look nothing up, so that blocks are doubled.

    Attributes:
        texts: of every prompt; blind: requests that look nothing up.
    """

    texts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    blind: frozenset[str] = frozenset()

    def hash(self, name: str, index: int) -> tuple[str, int]:
        return str(self.texts[name][: (index + 1) * self.reserve.block_size]), index

    def find(self, name: str) -> list[int]:
        return [] if name in self.blind else super().find(name)

    def step(self, waiting: list[str]) -> None:
        super().step(waiting)
        found = self.admission._held_twice()
        self.admission._doubled.clear()
        assert found == self.admission._held_twice(), "what was remembered is not so any more"
        admitted, union, promised = self.admission._admitted, set[int](), 0
        for name, doubled in reversed([*zip(admitted, found, strict=True)]):
            each, row = admitted[name], {block for block in self.rows[name] if block}
            assert len(row) <= each.own
            assert doubled <= len(row & union)
            most = each.without(each.peak, len(row & union))
            assert most + len(union) + promised <= self.pool, "an older one could lack blocks"
            union |= row
            promised += each.blocks - len(row)


@st.composite
def trees(draw: st.DrawFn) -> tuple[Texts, dict[str, Asked]]:
    engine, _ = draw(engines())
    size = engine.reserve.block_size
    pieces = st.integers(1, 40) | st.sampled_from([size, 2 * size])
    roots: list[tuple[int, ...]] = [()]
    for name, length in enumerate(draw(st.lists(pieces, max_size=5))):
        roots.append(draw(st.sampled_from(roots)) + (name,) * length)
    texts, requests = {}, {}
    for index in range(draw(st.integers(1, 25))):
        own = (-1 - draw(st.integers(0, 3)),) * draw(st.integers(0, 40))
        text = (draw(st.sampled_from(roots)) + own) or (-1,)
        answer, name = draw(st.integers(1, 60)), str(index)
        texts[name] = text
        requests[name] = Asked(len(text), answer, answer + draw(st.sampled_from([0, 0, 50])))
    reserve = dataclasses.replace(
        engine.reserve, observed=draw(st.integers(0, 4)), pin=draw(st.booleans())
    )
    reserve = in_bits(reserve, draw(PER_PAGE))
    least = max(peak(reserve, request) for request in requests.values())
    pool = least + draw(st.sampled_from([0, 1]) | st.integers(0, 2 * least))
    blind = draw(st.frozensets(st.sampled_from(sorted(requests)), max_size=3))
    given = {name: getattr(engine, name) for name in ("chunk", "ahead", "seqs", "answers")}
    return Texts(reserve, pool, texts=texts, blind=blind, **given), requests


@given(trees(), st.data())
def test_prompts_that_begin_alike_in_several_ways(
    made: tuple[Texts, dict[str, Asked]], data: st.DataObject
) -> None:
    engine, requests = made
    engine.serve(requests, data.draw(drops(requests, steps=200, most=12)))
