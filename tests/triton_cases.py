"""The Triton kernels against the reference; test_triton.py runs this in its interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
import reasonalloc
from examples import examples
from reasonalloc.attention import BACKENDS
from reasonalloc.cache import Slab
from strategies import lengths_of_heads

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def random_slab(
    seed: int, lengths: list[list[int]], dim: int, vdim: int, dtype: torch.dtype, uniform: bool
) -> Slab:
    """A slab whose runs lie apart, with numbers in every slot, also in those of no run."""
    batch, heads = len(lengths), len(lengths[0])
    run = max(max(row) for row in lengths) + 5
    slots = heads * run
    slab = Slab(batch, heads, slots, dim, vdim, dtype=dtype, device=DEVICE)
    generator = torch.Generator().manual_seed(seed)
    slab.keys.copy_(torch.randn(batch, slots, dim, generator=generator))
    slab.values.copy_(torch.randn(batch, slots, vdim, generator=generator))
    if uniform:
        slab.uniform_length = lengths[0][0]
        return slab
    slab.uniform_length = 1
    slab.make_ragged()
    slab.lengths.copy_(torch.tensor(lengths))
    room = slab.lengths + torch.randint(0, 5, (batch, heads), generator=generator).to(DEVICE)
    slab.offsets.copy_(room.cumsum(1) - room)
    return slab


@given(
    st.integers(0, 10**6),
    lengths_of_heads(st.integers(1, 90), 3, 2),
    st.integers(1, 4),
    st.sampled_from([(8, 8), (24, 16), (64, 64), (80, 48)]),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.sampled_from(DTYPES),
)
@examples(12)
def test_decode_is_the_reference(
    seed: int,
    lengths: list[list[int]],
    group: int,
    dims: tuple[int, int],
    softcap: float | None,
    uniform: bool,
    dtype: torch.dtype,
) -> None:
    if uniform:
        lengths = [[lengths[0][0]] * len(lengths[0])] * len(lengths)
    slab = random_slab(seed, lengths, *dims, dtype, uniform)
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (len(lengths), len(lengths[0]) * group, 1, dims[0])
    query = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    for name in ("triton", "sdpa"):
        found, received = BACKENDS.create(name).decode(query, slab, 0.3, softcap, True)
        expected, weights = BACKENDS.create("eager").decode(query, slab, 0.3, softcap, True)
        limit = TOLERANCE[dtype]
        torch.testing.assert_close(found, expected, rtol=limit, atol=limit)
        torch.testing.assert_close(received, weights, rtol=limit, atol=limit)
        plain, nothing = BACKENDS.create(name).decode(query, slab, 0.3, softcap, False)
        torch.testing.assert_close(plain, expected, rtol=limit, atol=limit)
        assert nothing is None


@pytest.mark.parametrize("arm", ["snapkv/uniform/reasonalloc", "value_aware"])
def test_a_model_writes_the_same(arm: str) -> None:
    model = models.tiny("llama").to(DEVICE)
    parts = arm if "/" in arm else f"{arm}/uniform/uniform"
    written = []
    for name, step in (("eager", "eager"), ("triton", "eager"), ("triton", "static")):
        settings: dict[str, Any] = {"attention": name, "step": step}
        with reasonalloc.attach(model, budget=16, arm=parts, interval=8, **settings):
            ids = models.prompt(20).to(DEVICE)
            written.append(model.generate(ids, max_new_tokens=18, do_sample=False).tolist())
    assert written[0] == written[1] == written[2]
