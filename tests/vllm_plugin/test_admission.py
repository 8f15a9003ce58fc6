"""Every request finishes, none is preempted, and blocks suffice; without vLLM."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from reasonalloc.integrations.vllm.admission import Admission
from reasonalloc.integrations.vllm.answers import Answers
from reasonalloc.integrations.vllm.layout import Reserve, make_layouts
from reasonalloc.integrations.vllm.windows import Windows

STILL = 10  # steps without a token


@dataclass
class Asked:
    """A request: its prompt, the tokens of its answer, and how many it may have."""

    prompt: int
    answer: int
    allowed: int


class Sanguine(Answers):
    """Expects every answer to end now."""

    def going_on(self, tokens: NDArray[np.int64], ahead: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.broadcast_to(ahead == 0, (len(tokens), len(ahead))).astype(np.float64)


@dataclass
class Engine:
    """A scheduler with a pool, as far as blocks go.

    Attributes:
        chunk: most tokens of a prefill in a step.
        ahead: steps that are scheduled before the first one's end is known.
        seqs: most requests at once.
        answers: what it expects of answers.
    """

    reserve: Reserve
    pool: int
    chunk: int = 1000
    ahead: int = 1
    seqs: int = 100
    answers: Answers = field(default_factory=Answers)
    held: dict[str, int] = field(default_factory=dict)
    beside: dict[str, int] = field(default_factory=dict)  # of layers with sliding windows
    tokens: dict[str, int] = field(default_factory=dict)
    asked: dict[str, Asked] = field(default_factory=dict)
    most: int = 0
    steps: int = 0
    pauses: int = 0

    def __post_init__(self) -> None:
        self.admission = Admission(self.reserve, self.pool, self.answers)
        self.pipeline: list[dict[str, int]] = []
        self.still = 0

    def take(self, name: str, tokens: int) -> None:
        """Blocks for a step that ends with ``tokens``, and back what is not needed any more."""
        start = self.admission.start(name)
        flying = sum(step.get(name, 0) for step in self.pipeline)
        processed = self.tokens[name] - flying
        if (
            processed >= self.reserve.first_event(start)
            and self.held.get(name, 0) > self.reserve.blocks
        ):
            self.held[name] = self.reserve.blocks
            self.admission.settle(name)
        if processed >= start and self.held.get(name, 0):
            self.admission.prefilled(name)
        need = self.reserve.needed(start, tokens)
        self.held[name] = max(self.held.get(name, 0), need)
        self.beside[name] = self.in_windows(tokens, processed)
        held = sum(self.held.values()) + sum(self.beside.values())
        assert held <= self.pool, "a request would be preempted"

    def in_windows(self, tokens: int, processed: int) -> int:
        """Blocks of layers with windows for a step that ends with ``tokens``.

        As vLLM: blocks that the window of the first token in flight does not reach are free.
        """
        size, widths = self.reserve.block_size, self.reserve.windows.widths
        gone = [max(0, processed - width + 1) // size for width in widths]
        return sum(-(-tokens // size) - skipped for skipped in gone)

    def can_admit(self, name: str) -> bool:
        return self.admission.can_admit(name)

    def cached(self, name: str) -> int:
        """Tokens that a new request need not compute."""
        return 0

    def step(self, waiting: list[str]) -> None:
        target = {
            name: max(self.asked[name].prompt, n + 1)
            for name, n in self.tokens.items()
            if n < self.asked[name].prompt + self.asked[name].allowed - 1
        }
        self.admission.expect(min(len(waiting), self.seqs - len(self.tokens)))
        paused = self.admission.pause(target)
        assert not paused or next(iter(self.tokens)) not in paused, "the oldest paused"
        self.pauses += len(paused)
        new: dict[str, int] = {}
        for name in [n for n in target if n not in paused]:
            new[name] = min(target[name] - self.tokens[name], self.chunk)
            self.take(name, self.tokens[name] + new[name])
        while waiting and len(self.tokens) < self.seqs:
            name = waiting[0]
            request = self.asked[name]
            self.admission.announce(name, request.prompt, request.prompt + request.allowed)
            if not self.can_admit(name):
                break
            assert not paused
            self.tokens[name] = self.cached(waiting.pop(0))
            self.admission.admit(name)
            new[name] = min(request.prompt - self.tokens[name], self.chunk)
            self.take(name, self.tokens[name] + new[name])
        for name, more in new.items():
            self.tokens[name] += more
        self.still = 0 if new else self.still + 1
        assert self.still < STILL, "it stands still"
        self.pipeline.append(new)
        if len(self.pipeline) >= self.ahead:
            self.learn(self.pipeline.pop(0))
        self.most = max(self.most, len(self.tokens))
        self.steps += 1

    def learn(self, done: dict[str, int]) -> None:
        """A step has ended: some requests have their last token."""
        for name in done:
            if name in self.tokens:
                flying = sum(step.get(name, 0) for step in self.pipeline)
                request = self.asked[name]
                if self.tokens[name] - flying >= request.prompt + request.answer - 1:
                    self.drop(name)

    def drop(self, name: str) -> None:
        self.admission.forget(name)
        self.held.pop(name, None)
        self.beside.pop(name, None)
        self.tokens.pop(name, None)

    def serve(self, requests: dict[str, Asked], drops: dict[int, str] | None = None) -> None:
        """All requests, some of them dropped (aborted) before a step."""
        self.asked.update(requests)
        waiting, gone = list(requests), drops or {}
        while waiting or self.tokens:
            if (name := gone.get(self.steps)) is not None:
                self.drop(name)
                waiting = [other for other in waiting if other != name]
            self.step(waiting)
        assert not self.held


def peak(reserve: Reserve, request: Asked) -> int:
    """The most blocks that a request can need."""
    start, last = request.prompt, request.prompt + request.allowed
    return reserve.peak(start, last) + reserve.windows.peak(start, last)


@st.composite
def engines(draw: st.DrawFn) -> tuple[Engine, dict[str, Asked]]:
    heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    total = st.integers(heads * 4, heads * 30)
    ranks = [draw(st.lists(total, min_size=layers, max_size=layers))]
    size = draw(st.sampled_from([1, 2, 4, 16]))
    chunk, ahead = draw(st.sampled_from([3, 16, 1000])), draw(st.integers(1, 2))
    widths = draw(st.lists(st.integers(1, 60), max_size=3))
    windows = Windows(tuple(widths), size, chunk * ahead, ahead)
    interval = draw(st.integers(1, 20))
    reserve = make_layouts(ranks, heads, interval, size, windows=windows)[0].reserve
    request = st.builds(
        lambda prompt, answer, more: Asked(prompt, answer, answer + more),
        st.integers(1, 80),
        st.integers(1, 150),
        st.integers(0, 100),
    )
    requests = {str(i): r for i, r in enumerate(draw(st.lists(request, min_size=1, max_size=25)))}
    least = max(peak(reserve, r) for r in requests.values())
    engine = Engine(
        reserve,
        draw(st.integers(least, 4 * least)),
        chunk=chunk,
        ahead=ahead,
        seqs=draw(st.sampled_from([2, 8, 100])),
        answers=draw(st.sampled_from([Answers, Sanguine]))(),
    )
    return engine, requests


def drops(
    requests: dict[str, Asked], steps: int = 60, most: int = 4
) -> st.SearchStrategy[dict[int, str]]:
    """Requests that are aborted, by the step before which they are."""
    name = st.sampled_from(sorted(requests))
    return st.dictionaries(st.integers(0, steps), name, max_size=most)


@given(engines(), st.data())
def test_every_request_finishes_without_preemption(
    made: tuple[Engine, dict[str, Asked]], data: st.DataObject
) -> None:
    engine, requests = made
    engine.serve(requests, data.draw(drops(requests)))


@given(engines())
def test_blocks_that_all_need_at_once_are_never_waited_for(
    made: tuple[Engine, dict[str, Asked]],
) -> None:
    engine, requests = made
    engine.pool = sum(peak(engine.reserve, r) for r in requests.values())
    engine.admission = Admission(engine.reserve, engine.pool, engine.answers)
    engine.serve(requests)
    assert engine.pauses == 0
    assert engine.most <= engine.seqs


RESERVE = make_layouts([[8 * 1024]], 8, 128, 16)[0].reserve


def test_short_answers_more_than_double_concurrency() -> None:
    pool = 10 * RESERVE.peak(20, 4116)
    engine = Engine(RESERVE, pool)
    engine.serve({str(i): Asked(20, 400, 4096) for i in range(200)})
    assert engine.most >= 20
    assert engine.steps <= 200 / 10 * 400 / 2


def test_short_answers_of_many_lengths_fill_the_pool() -> None:
    """They end one after the other: if room was kept for all ends at once, it took 2,162 steps."""
    reserve, source = make_layouts([[2 * 96] * 4], 2, 64, 32)[0].reserve, random.Random(0)
    engine = Engine(reserve, 95, ahead=2)
    for run in range(4):
        engine.serve(
            {
                f"{run} {i}": Asked(
                    max(4, round(source.lognormvariate(3.2, 1))),
                    max(4, min(round(source.lognormvariate(3.9, 1)), 256)),
                    2000,
                )
                for i in range(96)
            }
        )
    assert engine.steps <= 1800


def test_long_answers_lose_nothing() -> None:
    pool = 10 * RESERVE.peak(20, 4116)
    engine = Engine(RESERVE, pool)
    engine.serve({str(i): Asked(20, 3000, 4096) for i in range(40)})
    assert engine.steps <= 1.02 * 4 * 3000


def test_answers_that_suddenly_get_long_are_served_by_several_at_once() -> None:
    engine = Engine(RESERVE, 10 * RESERVE.peak(20, 4116))
    engine.serve({str(i): Asked(20, 200, 4096) for i in range(60)})
    before = engine.steps
    engine.serve({f"long{i}": Asked(20, 3000, 4096) for i in range(40)})
    assert engine.pauses > 0
    assert engine.steps - before <= 2.5 * (4 * 3000)


SMALL = make_layouts([[2 * 64]], 2, 16, 4)[0].reserve


@pytest.mark.parametrize("peaks", [1.0, 1.5, 2.3, 4.0, 7.9])
@pytest.mark.parametrize("ahead", [1, 2])
def test_nothing_stands_still_where_far_too_many_are_admitted(peaks: float, ahead: int) -> None:
    pool = int(peaks * SMALL.peak(150, 400))
    engine = Engine(SMALL, pool, chunk=50, ahead=ahead, answers=Sanguine())
    prompts = [3, 40, 9, 150, 1, 77]
    engine.serve({str(i): Asked(prompts[i % 6], 60 + 7 * i, 400) for i in range(40)})
    assert engine.pauses > 0


def going_on(answers: Answers, tokens: int, *ahead: int) -> list[float]:
    return [float(x) for x in answers.going_on(np.array([tokens]), np.array(ahead))[0]]


def test_what_is_expected_of_answers() -> None:
    answers = Answers()
    assert going_on(answers, 5, 0, 1000) == [1, 1]
    for name, tokens in (("a", 10), ("b", 20), ("c", 61), ("d", 20)):
        answers.add(name, tokens)
    shares = [1, 1, 0.75, 0.75, 0.25, 0.25, 0]
    assert going_on(answers, 1, 0, 9, 10, 19, 20, 60, 61) == pytest.approx(shares)
    assert going_on(answers, 11, 9, 10, 50, 51) == pytest.approx([1, 1 / 3, 1 / 3, 0])
    assert going_on(answers, 62, 0, 1000) == [1, 1]
    both = answers.going_on(np.array([11, 40]), np.array([9, 10, 50]))
    assert both[0] == pytest.approx([1, 0.5, 0.5])  # the one at 40 did not end at 20
    answers.take_back("c")
    assert going_on(answers, 11, 9, 10) == pytest.approx([1, 0])
    for index in range(200):
        answers.add(str(index), 7)
    assert going_on(answers, 8, 100) == [1]


def test_a_request_that_the_pool_can_never_hold_waits() -> None:
    admission = Admission(RESERVE, 10)
    admission.announce("a", 20, 4000)
    assert not admission.can_admit("a")
    with pytest.raises(KeyError):
        admission.start("b")
