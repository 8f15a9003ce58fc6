"""The Triton kernels against the reference; test_triton.py runs this in its interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

import models
import reasonalloc
from coded_layers import KINDS, dense_attention, made_coded
from examples import examples
from reasonalloc.attention import BACKENDS
from reasonalloc.attention.kernels.coded import _e4m3
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
    st.integers(1, 8),
    st.sampled_from([(8, 8), (24, 16), (64, 64), (80, 48)]),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.sampled_from(DTYPES),
    st.sampled_from([None, 0.0, 3.0, -200.0, 200.0]),
)
@examples(16)
def test_decode_is_the_reference(
    seed: int,
    lengths: list[list[int]],
    group: int,
    dims: tuple[int, int],
    softcap: float | None,
    uniform: bool,
    dtype: torch.dtype,
    sink: float | None,
) -> None:
    if uniform:
        lengths = [[lengths[0][0]] * len(lengths[0])] * len(lengths)
    slab = random_slab(seed, lengths, *dims, dtype, uniform)
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (len(lengths), len(lengths[0]) * group, 1, dims[0])
    query = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    sinks = None if sink is None else sink + torch.randn(shape[1], generator=generator)
    sinks = None if sinks is None else sinks.to(DEVICE, dtype)
    for name in ("triton", "sdpa"):
        found, received = BACKENDS.create(name).decode(query, slab, 0.3, softcap, True, sinks)
        slow = BACKENDS.create("eager")
        expected, weights = slow.decode(query, slab, 0.3, softcap, True, sinks)
        limit = TOLERANCE[dtype]
        torch.testing.assert_close(found, expected, rtol=limit, atol=limit)
        torch.testing.assert_close(received, weights, rtol=limit, atol=limit)
        plain, nothing = BACKENDS.create(name).decode(query, slab, 0.3, softcap, False, sinks)
        torch.testing.assert_close(plain, expected, rtol=limit, atol=limit)
        assert nothing is None


@pytest.mark.parametrize(("dims", "group"), [((64, 64), 71), ((288, 272), 20), ((32, 16), 17)])
@pytest.mark.parametrize("uniform", [False, True])
def test_groups_that_are_cut_into_tiles(dims: tuple[int, int], group: int, uniform: bool) -> None:
    """All query heads have one KV head: multi-query attention, and latents."""
    slab = random_slab(3, [[70], [70]] if uniform else [[70], [33]], *dims, torch.float32, uniform)
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(2, group, 1, dims[0], generator=generator).to(DEVICE)
    expected, weights = BACKENDS.create("eager").decode(query, slab, 0.1, 20.0, True)
    found, received = BACKENDS.create("triton").decode(query, slab, 0.1, 20.0, True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(received, weights, rtol=1e-4, atol=1e-4)


@given(
    st.integers(0, 10**6),
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    st.integers(0, 3),
    st.integers(1, 8),
    st.sampled_from([(24, 16), (64, 64), (80, 48), (32, 128), (256, 24)]),
    st.sampled_from([None, 2.0]),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
)
@examples(16)
def test_coded_runs(
    seed: int,
    kinds: list[str],
    same: int,
    group: int,
    dims: tuple[int, int],
    softcap: float | None,
    dtype: torch.dtype,
    sunk: bool,
) -> None:
    """One format for all heads, twice each or one per head; ragged runs, some empty."""
    kinds = kinds[:1] * same if same else kinds * 2
    generator = torch.Generator().manual_seed(seed)
    shape = (2, len(kinds))
    lengths = torch.randint(0, 90, shape, generator=generator)
    lengths *= torch.rand(shape, generator=generator) < 0.8
    tails = torch.randint(1, 80, shape, generator=generator)
    slab = made_coded(seed, kinds, lengths.tolist(), tails.tolist(), dims, dtype, DEVICE)
    query = torch.randn(2, len(kinds) * group, 1, dims[0], generator=generator).to(DEVICE, dtype)
    sinks = (2 * torch.randn(query.shape[1], generator=generator)).to(DEVICE) if sunk else None
    expected, weights = dense_attention(query, slab, 0.3, softcap, sinks)
    backend = BACKENDS.create("triton")
    out, received = backend.decode_coded(query, slab, 0.3, softcap, True, sinks)
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(out.double().cpu(), expected, rtol=limit, atol=limit)
    limit = 1e-4 if dtype == torch.float32 or DEVICE.type == "cpu" else 1e-2
    assert received is not None
    torch.testing.assert_close(received.double().cpu(), weights, rtol=limit, atol=limit)
    plain, nothing = backend.decode_coded(query, slab, 0.3, softcap, False, sinks)
    assert torch.equal(plain, out) and nothing is None


@triton.jit
def _every_byte(codes, out):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 256)
    tl.store(out + at, _e4m3(tl.load(codes + at)))


def test_every_code_of_fp8() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    out = torch.empty(256, device=DEVICE)
    _every_byte[(1,)](codes, out)
    expected = codes.view(torch.float8_e4m3fn).float()
    numbers = ~expected.isnan()
    assert torch.equal(out[numbers], expected[numbers])


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
