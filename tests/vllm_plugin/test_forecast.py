"""What requests are expected to need together, against all ways in which they can go on."""

from __future__ import annotations

from itertools import product
from math import prod, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_admission import Asked, Engine, engines

from reasonalloc.integrations.vllm.admitted import Admitted
from reasonalloc.integrations.vllm.answers import Answers
from reasonalloc.integrations.vllm.forecast import most_expected
from reasonalloc.integrations.vllm.layout import make_layouts


def needed(request: Admitted, later: int, doubled: int) -> int:
    """Blocks of a request that has got so long."""
    reserve = request.reserve
    if later < request.first:
        own = max(request.own, -(-later // reserve.block_size)) - doubled
    else:
        own = reserve.held(request.start) - (doubled if reserve.stays else 0)
    return own + reserve.windows.decode(later)


def slowly(requests: list[Admitted], doubled: list[int], answers: Answers, sure: float) -> float:
    """Every moment, and in it every set of requests that go on."""
    written = np.array([r.tokens - r.start + 1 for r in requests])
    largest = 0.0
    for ahead in range(max(0, *(min(r.first, r.last) - r.tokens for r in requests)) + 1):
        going, blocks, kept = [], [], 0.0
        shares = answers.going_on(written, np.array([ahead]))[:, 0]
        for request, twice, share in zip(requests, doubled, shares, strict=True):
            later = request.tokens + ahead
            going.append(float(share) if later <= request.last else 0.0)
            blocks.append(needed(request, later, twice))
            kept += going[-1] * request.peak
            if kept <= sure:
                blocks[-1] = max(blocks[-1], request.peak - twice)
        mean = square = 0.0
        for outcome in product((0, 1), repeat=len(requests)):
            chance = prod(p if on else 1 - p for p, on in zip(going, outcome, strict=True))
            total = sum(b for b, on in zip(blocks, outcome, strict=True) if on)
            mean += chance * total
            square += chance * total**2
        largest = max(largest, mean + 1.5 * sqrt(max(square - mean**2, 0)))
    return largest


@given(engines(), st.data(), st.lists(st.integers(1, 60), max_size=12))
def test_as_all_ways_to_go_on(
    made: tuple[Engine, dict[str, Asked]], data: st.DataObject, lengths: list[int]
) -> None:
    reserve, answers = made[0].reserve, Answers()
    for name, length in enumerate(lengths):
        answers.add(str(name), length)
    requests, doubled = [], []
    for asked in [*made[1].values()][:5]:
        request = Admitted(reserve, asked.prompt, asked.prompt + asked.allowed)
        request.tokens = data.draw(st.integers(asked.prompt, request.last))
        request.grow(request.tokens)
        requests.append(request)
        doubled.append(data.draw(st.integers(0, min(2, request.own))))
    sure = data.draw(st.integers(0, 40))
    assert most_expected(requests, doubled, answers, sure) == pytest.approx(
        slowly(requests, doubled, answers, sure), abs=1e-5
    )


def test_what_is_expected_lies_between_the_mean_and_all() -> None:
    reserve = make_layouts([[64]], 2, 16, 8)[0].reserve
    answers = Answers()
    for name in range(10):
        answers.add(str(name), 5 if name < 5 else 1000)
    requests = [Admitted(reserve, 20, 2000) for _ in range(16)]
    for request in requests:
        request.settle()
        request.tokens = request.first + 4
    half = [Admitted(reserve, 20, 2000) for _ in range(16)]
    every = sum(request.blocks for request in requests)
    assert most_expected(requests, [0] * 16, answers, 0) == every  # they are longer than 5
    assert most_expected(half, [0] * 16, answers, 0) < every
