"""When layers are compressed: closed forms beside going from boundary to boundary."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

import reference
from examples import examples
from reasonalloc.core.cadence import Cadence, compression_points, most_held, overflow

LAYERS = st.tuples(st.integers(1, 60), st.integers(1, 5), st.integers(1, 12))
SEQUENCES = st.tuples(st.integers(1, 40), st.integers(0, 60))


@given(LAYERS, SEQUENCES)
@examples(300)
def test_compressions(layer: tuple[int, int, int], sequence: tuple[int, int]) -> None:
    (total, kv_heads, interval), (prompt, steps) = layer, sequence
    expected = reference.compression_points(total, kv_heads, interval, prompt, steps)
    assert compression_points(total, kv_heads, interval, prompt, steps) == expected


@given(LAYERS, SEQUENCES)
@examples(300)
def test_what_is_held(layer: tuple[int, int, int], sequence: tuple[int, int]) -> None:
    (total, kv_heads, interval), (prompt, steps) = layer, sequence
    cadence, held = Cadence(interval), kv_heads * prompt
    for tokens in range(prompt, prompt + steps + 1):
        held += kv_heads if tokens > prompt else 0
        if tokens == cadence.boundary(prompt, tokens):  # a boundary
            assert (tokens - prompt) % interval == 0
            held = min(held, total)
        assert cadence.held(prompt, tokens, total, kv_heads) == held
        if tokens >= cadence.boundary(prompt, overflow(total, kv_heads)):
            assert held <= most_held(total, kv_heads, interval)
