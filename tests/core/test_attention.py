"""Backends and dense attention against one head and one query at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from reasonalloc.attention import BACKENDS, choose_backend
from reasonalloc.attention.dense import attend, received_blocks
from reasonalloc.cache import Slab
from reasonalloc.errors import UsageError
from strategies import lengths_of_heads


def filled_slab(
    seed: int, lengths: list[list[int]], uniform: bool, dtype: torch.dtype = torch.float32
) -> Slab:
    generator = torch.Generator().manual_seed(seed)
    batch, heads = len(lengths), len(lengths[0])
    slots = max(sum(row) for row in lengths) + heads * 3
    if uniform:
        slots = heads * (lengths[0][0] + 3)
    slab = Slab(batch, heads, slots, 8, 8, dtype=dtype, device=torch.device("cpu"))
    m = max(max(row) for row in lengths)
    flat = torch.randn(batch, heads * m, 8, generator=generator).to(dtype)
    rows = slab.as_rows()
    rows.keys, rows.values = flat, flat.flip(1)
    rows.positions = torch.zeros(batch, heads * m, dtype=torch.int32)
    rows.index = (torch.arange(heads)[:, None] * m + torch.arange(m)).expand(batch, -1, -1)
    keep = torch.arange(m) < torch.tensor(lengths)[..., None]
    slab.rewrite(rows, keep, lengths[0][0] if uniform else None)
    return slab


def slow_decode(
    query: torch.Tensor,
    slab: Slab,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, query_heads = query.shape[:2]
    out = torch.zeros_like(query)
    received = torch.zeros(batch, slab.slots)
    for b in range(batch):
        for q in range(query_heads):
            h = q // (query_heads // slab.kv_heads)
            start = int(slab.offsets[b, h])
            run = slice(start, start + int(slab.lengths[b, h]))
            logits = slab.keys[b, run].float() @ query[b, q, 0].float() * scaling
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            weights = softmax_with(None if sinks is None else sinks[q], logits)
            received[b, run] += weights
            out[b, q, 0] = (weights @ slab.values[b, run].float()).to(query.dtype)
    return out, received


def softmax_with(sink: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """Softmax of [n] logits, and of a sink that is then left out."""
    if sink is None:
        return logits.softmax(0)
    return torch.cat([logits, sink.view(1)]).softmax(0)[:-1]


@given(
    st.integers(0, 10**6),
    lengths_of_heads(st.integers(1, 20), 4, 3),
    st.integers(1, 8),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.sampled_from([None, 0.0, 3.0, -200.0, 200.0]),
)
@examples(80)
def test_decode(
    seed: int,
    lengths: list[list[int]],
    group: int,
    softcap: float | None,
    uniform: bool,
    sink: float | None,
) -> None:
    if uniform:
        lengths = [[lengths[0][0]] * len(lengths[0])] * len(lengths)
    slab = filled_slab(seed, lengths, uniform)
    query = torch.randn(len(lengths), len(lengths[0]) * group, 1, 8)
    sinks = None if sink is None else sink + torch.randn(query.shape[1])
    expected, received = slow_decode(query, slab, 0.3, softcap, sinks)
    for name in set(BACKENDS.entries()) - {"triton"}:  # that one has a file of its own
        for need_weights in (False, True):
            how = (0.3, softcap, need_weights, sinks)
            out, weights = BACKENDS.create(name).decode(query, slab, *how)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            assert (weights is not None) == need_weights
            if weights is not None:
                torch.testing.assert_close(weights, received, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("uniform", [True, False])
def test_decode_in_half_precision(dtype: torch.dtype, uniform: bool) -> None:
    slab = filled_slab(0, [[7, 7], [7, 7]] if uniform else [[3, 9], [12, 1]], uniform, dtype)
    query = torch.randn(2, 4, 1, 8).to(dtype)
    expected, _ = slow_decode(query, slab, 0.3, None)
    for name in set(BACKENDS.entries()) - {"triton"}:
        out, _ = BACKENDS.create(name).decode(query, slab, 0.3, None, False)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("sunk", [True, False])
def test_dense(
    softcap: float | None, masked: bool, sunk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reasonalloc.attention import dense

    monkeypatch.setattr(dense, "_BLOCK_ELEMENTS", 200)  # several blocks of queries
    batch, heads, group, n = 2, 2, 3, 9
    query = torch.randn(batch, heads * group, n, 8)
    keys, values = torch.randn(batch, heads, n, 8), torch.randn(batch, heads, n, 8)
    visible = torch.ones(n, n, dtype=torch.bool).tril().expand(batch, 1, n, n).clone()
    valid = torch.ones(batch, n, dtype=torch.bool)
    if masked:
        valid[1, :4] = False
        visible &= valid[:, None, None, :]
    mask = visible if masked else None
    sinks = 2 * torch.randn(heads * group) if sunk else None
    out = attend(query, keys, values, mask, 0.3, softcap, sinks)
    real = valid if masked else None
    blocks = list(received_blocks(query, keys, mask, real, 0.3, softcap, sinks))
    assert len(blocks) > 1 and [start for start, _, _ in blocks[1:]] == [
        e for _, e, _ in blocks[:-1]
    ]
    received = torch.cat([weights for _, _, weights in blocks], dim=2)
    expected = torch.zeros(batch, heads, n, n)
    for b in range(batch):
        for q in range(heads * group):
            for i in range(n):
                if not valid[b, i]:
                    continue
                seen = visible[b, 0, i]
                logits = keys[b, q // group, seen] @ query[b, q, i] * 0.3
                if softcap is not None:
                    logits = torch.tanh(logits / softcap) * softcap
                weights = softmax_with(None if sinks is None else sinks[q], logits)
                expected[b, q // group, i, seen] += weights / group
                torch.testing.assert_close(
                    out[b, q, i], weights @ values[b, q // group, seen], rtol=1e-4, atol=1e-5
                )
    torch.testing.assert_close(received, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("queries", "value_dim"), [(1, 8), (7, 8), (7, 24)])
def test_dense_with_sinks(queries: int, value_dim: int, dtype: torch.dtype) -> None:
    """A new query alone, values of another width, scales that halves do not hold."""
    torch.manual_seed(queries)
    query, keys = torch.randn(2, 6, queries, 8).to(dtype), torch.randn(2, 3, 7, 8).to(dtype)
    values, sinks = torch.randn(2, 3, 7, value_dim).to(dtype), 3 * torch.randn(6)
    out = attend(query, keys, values, None, 0.3, None, sinks)
    assert out.dtype == dtype
    logits = query.float() @ keys.float().repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    future = torch.ones(queries, 7, dtype=torch.bool).triu(8 - queries)
    logits = logits.masked_fill(future, -torch.inf)
    whole = torch.cat([logits, sinks.view(1, 6, 1, 1).expand(2, -1, queries, 1)], dim=-1)
    expected = whole.softmax(-1)[..., :-1] @ values.float().repeat_interleave(2, 1)
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.float(), expected, rtol=limit, atol=limit)


def test_gradients_reach_sinks() -> None:
    sinks = torch.zeros(4, requires_grad=True)
    query, keys = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    for softcap in (None, 1e6):
        out = attend(query, keys, keys, None, 0.3, softcap, sinks)
        (gradient,) = torch.autograd.grad(out.square().sum(), sinks)
        assert bool((gradient < 0).all())  # a larger sink leaves less


def test_unknown_backend() -> None:
    with pytest.raises(
        UsageError, match="'flash' is unknown: choose one of auto, cpp, eager, sdpa"
    ):
        choose_backend("flash")
