"""Attention of many queries at once: prefill, and chunks on top of a compressed cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from reasonalloc.sinks import softmax

_BLOCK_ELEMENTS = 1 << 23  # explicit logits are worked off in blocks of queries
_SINK_COLUMNS = 8  # of vectors that stand for sinks; the kernels of GPUs want multiples of 8


def repeat_heads(tensor: Tensor, query_heads: int) -> Tensor:
    """[batch, kv_heads, ...] repeated to [batch, query_heads, ...], group by group."""
    group = query_heads // tensor.shape[1]
    return tensor if group == 1 else tensor.repeat_interleave(group, dim=1)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of a chunk of queries.

    Args:
        query: [batch, query_heads, q, head_dim].
        keys, values: [batch, kv_heads, n, ...].
        mask: bool, broadcastable to [batch, query_heads, q, n], or None for a causal chunk whose
            last query sees the last key (``q == n`` or ``q == 1``).
        scaling, softcap: of the logits.
        sinks: [query_heads] learned sinks, see ``reasonalloc.sinks``, or None.

    Returns:
        [batch, query_heads, q, value_dim].
    """
    heads = query.shape[1]
    if softcap is None and sinks is not None:
        return _attend_with_sinks(query, keys, values, mask, scaling, sinks)
    if softcap is None and mask is None:  # the fast kernels, without a mask and without copies
        return F.scaled_dot_product_attention(
            query,
            keys,
            values,
            is_causal=query.shape[2] > 1,
            scale=scaling,
            enable_gqa=heads != keys.shape[1],
        )
    keys, values = repeat_heads(keys, heads), repeat_heads(values, heads)
    if softcap is None:
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling)
    blocks = []
    for start, stop in query_blocks(query, keys):
        weights = _weights(query, keys, mask, scaling, softcap, sinks, start, stop)
        blocks.append(weights.to(values.dtype) @ values)
    return torch.cat(blocks, dim=2)


def _attend_with_sinks(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    sinks: Tensor,
) -> Tensor:
    """``attend`` by the fused kernels, which know no sinks: a key in front stands for them.

    It is zero but for more columns, in which queries have their head's sink; its value is zero.
    """
    width, ahead = values.shape[-1], int(mask is None and query.shape[2] > 1)
    columns = _sink_columns(sinks, query.dtype)[:, None].expand(*query.shape[:3], -1)
    # A causal chunk stays square, which is what the kernels take: with a query in front as well.
    query = F.pad(torch.cat([query, columns], dim=-1), (0, 0, ahead, 0))
    whole, part = _rounded(1 / scaling, keys.dtype)
    dim, keys = keys.shape[-1], F.pad(keys, (0, _SINK_COLUMNS, 1, 0))
    for column, number in enumerate((whole, part, whole)):
        keys[:, :, 0, dim + column] = number
    values = F.pad(values, (0, max(0, keys.shape[-1] - width), 1, 0))
    mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    return attend(query, keys, values, mask, scaling, None)[:, :, ahead:, :width]


def _sink_columns(sinks: Tensor, dtype: torch.dtype) -> Tensor:
    """[query_heads, columns]: each sink as a rounded number, that again, and what it lacks."""
    whole = sinks.to(dtype)
    part = (sinks.float() - whole.float()).to(dtype)
    return F.pad(torch.stack([whole, whole, part], dim=-1), (0, _SINK_COLUMNS - 3))


def _rounded(number: float, dtype: torch.dtype) -> tuple[float, float]:
    """A number in a type, and what it lacks."""
    whole = float(torch.tensor(number, dtype=dtype, device="cpu"))
    return whole, number - whole


def received_blocks(
    query: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    query_valid: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None = None,
    runs: int | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Attention that each key receives from each query, in blocks of queries.

    Arguments as for ``attend``; ``query_valid`` is [batch, q] bool, or None if every query is a
    real token; ``runs`` is the number of heads that tokens are stored for: None: ``kv_heads``.

    Yields:
        First and last (exclusive) query of a block, and weights [batch, runs, stop - start, n]
        float32, averaged over the query heads of the group; 0 for padding.
    """
    runs = keys.shape[1] if runs is None else runs
    repeated = repeat_heads(keys, query.shape[1])
    blocks = (
        (start, stop, _weights(query, repeated, mask, scaling, softcap, sinks, start, stop))
        for start, stop in query_blocks(query, repeated)
    )
    return received_by_run(blocks, runs, query_valid)


def received_by_run(
    blocks: Iterable[tuple[int, int, Tensor]], runs: int, query_valid: Tensor | None
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield blocks of attention weights, averaged over the query heads of each run.

    Args:
        blocks: first and last (exclusive) query, and weights [batch, query_heads, queries, n].
        runs: KV heads that hold the keys.
        query_valid: [batch, q] bool, false at padding; None if all queries are real.

    Returns:
        The same with weights [batch, runs, queries, n]; 0 where the query is padding.
    """
    for start, stop, weights in blocks:
        if query_valid is not None:
            weights = weights * query_valid[:, None, start:stop, None]
        yield start, stop, weights.unflatten(1, (runs, -1)).mean(dim=2)


def query_blocks(query: Tensor, keys: Tensor) -> list[tuple[int, int]]:
    """Return first and last (exclusive) queries of blocks whose logits are not too many."""
    batch, heads, queries, _ = query.shape
    rows = max(1, _BLOCK_ELEMENTS // max(1, batch * heads * keys.shape[2]))
    return [(start, min(start + rows, queries)) for start in range(0, queries, rows)]


def _weights(
    query: Tensor,
    keys: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    start: int,
    stop: int,
) -> Tensor:
    logits = (query[:, :, start:stop] * scaling @ keys.transpose(-1, -2)).float()
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    queries, n = query.shape[2], keys.shape[2]
    if mask is None:
        rows = torch.arange(start, stop, device=query.device)[:, None] + (n - queries)
        visible = torch.arange(n, device=query.device) <= rows
    else:
        visible = mask[:, :, start:stop]
    return softmax(logits.masked_fill(~visible, torch.finfo(logits.dtype).min), sinks)
