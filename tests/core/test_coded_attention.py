"""Attention over coded runs and their tails, against one query head at a time."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from coded_layers import KINDS, dense_attention, made_coded
from examples import examples
from reasonalloc.attention import BACKENDS
from strategies import lengths_of_heads

#: Those without loops of their own, which have tests of their own.
NAMES = ("eager", "sdpa")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def kinds_of(data: st.DataObject, heads: int) -> list[str]:
    """A format for all heads, or one each."""
    if data.draw(st.booleans(), "one format"):
        return [data.draw(st.sampled_from(KINDS))] * heads
    return data.draw(st.lists(st.sampled_from(KINDS), min_size=heads, max_size=heads))


@given(
    st.data(),
    st.integers(0, 10**6),
    lengths_of_heads(st.integers(0, 20), 4, 3),
    st.integers(1, 8),
    st.sampled_from([(24, 16), (64, 64), (80, 48), (32, 128), (256, 24)]),
    st.sampled_from([None, 2.0]),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
)
@examples(80)
def test_decode_coded(
    data: st.DataObject,
    seed: int,
    lengths: list[list[int]],
    group: int,
    dims: tuple[int, int],
    softcap: float | None,
    dtype: torch.dtype,
    sunk: bool,
) -> None:
    kinds = kinds_of(data, len(lengths[0]))
    tails = [[1 + (seed + length) % 7 for length in row] for row in lengths]
    slab = made_coded(seed, kinds, lengths, tails, dims, dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (len(lengths), len(kinds) * group, 1, dims[0])
    query = torch.randn(shape, generator=generator).to(dtype)
    sinks = 2 * torch.randn(shape[1], generator=generator) if sunk else None
    expected, weights = dense_attention(query, slab, 0.3, softcap, sinks)
    limit = TOLERANCE[dtype]
    for name in NAMES:
        for need_weights in (False, True):
            backend = BACKENDS.create(name)
            how = (0.3, softcap, need_weights, sinks)
            out, received = backend.decode_coded(query, slab, *how)
            assert out.dtype == dtype and (received is not None) == need_weights
            torch.testing.assert_close(out.double(), expected, rtol=limit, atol=limit)
            if received is not None:
                assert received.dtype == torch.float32
                torch.testing.assert_close(received.double(), weights, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kinds", [["int4h", "int4h"], ["int8", "auto:fp8"]])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_back(name: str, kinds: list[str]) -> None:
    """On tensors that have no data at all."""
    slab = made_coded(0, kinds, [[5, 0], [2, 9]], [[1, 2], [3, 1]], (24, 16), torch.float16)
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the matrix of the rotation
    fakes: dict[str, Any] = {
        f.name: mode.from_tensor(getattr(slab, f.name))
        for f in fields(slab)
        if isinstance(getattr(slab, f.name), torch.Tensor)
    }
    query = mode.from_tensor(torch.ones(2, 6, 1, 24, dtype=torch.float16))
    with mode:
        backend = BACKENDS.create(name)
        out, received = backend.decode_coded(query, replace(slab, **fakes), 0.3, 2.0, True)
    assert out.shape == (2, 6, 1, 16)
    assert received is not None and received.shape == slab.positions.shape
