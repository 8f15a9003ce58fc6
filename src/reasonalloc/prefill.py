"""What a layer sees and holds when several tokens come at once."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonalloc.attention.dense import repeat_heads
from reasonalloc.cache import Rows


def over_past(past: Rows, mask: Tensor | None, columns: int, query_heads: int) -> Tensor:
    """[batch, query_heads, q, past + q] bool: all of the past, the new tokens as ``mask`` says."""
    batch, _, n = past.index.shape
    held = torch.arange(n, device=past.index.device) < past.lengths[..., None]
    held = repeat_heads(held, query_heads)[:, :, None].expand(-1, -1, columns, -1)
    if mask is None:
        mask = torch.ones(columns, columns, dtype=torch.bool, device=held.device).tril()
    return torch.cat([held, mask.expand(batch, query_heads, columns, columns)], dim=-1)


def joined_rows(
    past: Rows | None,
    key: Tensor,
    value: Tensor,
    seen: int | Tensor,
    valid: Tensor | None,
    received: Tensor | None,
) -> Rows:
    """What a layer holds after a prefill: the past and the real new tokens, left-aligned."""
    batch, heads, columns, _ = key.shape
    device = key.device
    flat_keys, flat_values = key.flatten(1, 2), value.flatten(1, 2)
    new = torch.arange(columns, device=device)
    if valid is None and isinstance(seen, int):
        positions = (seen + new).expand(batch, -1)
    else:
        real = torch.ones(batch, columns, device=device) if valid is None else valid
        start = seen if isinstance(seen, int) else seen[:, None]
        positions = start + real.long().cumsum(dim=1) - 1
    positions = positions[:, None].expand(-1, heads, -1).reshape(batch, -1).to(torch.int32)
    index = (torch.arange(heads, device=device)[:, None] * columns + new).expand(batch, -1, -1)
    is_token = None if valid is None else valid[:, None].expand(-1, heads, -1)
    if past is None:
        attention = None if received is None else received.flatten(1)
        lengths = torch.full((batch, heads), columns, device=device)
    else:
        offset = past.keys.shape[1]
        n = past.index.shape[2]
        flat_keys = torch.cat([past.keys, flat_keys], dim=1)
        flat_values = torch.cat([past.values, flat_values], dim=1)
        positions = torch.cat([past.positions, positions], dim=1)
        attention = None
        if received is not None and past.attention is not None:
            # Both parts in the order of their storage; the past also keeps what it had.
            old = past.attention.scatter_add(
                1, past.index.flatten(1), (received[..., :n] * _tokens(past)).flatten(1)
            )
            attention = torch.cat([old, received[..., n:].flatten(1)], dim=1)
        index = torch.cat([past.index, index + offset], dim=2)
        fresh = torch.ones_like(index[..., n:], dtype=torch.bool) if is_token is None else is_token
        is_token = torch.cat([_tokens(past), fresh], dim=2)
        lengths = is_token.sum(dim=-1)
    if is_token is not None:
        order = is_token.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        index = index.gather(-1, order)
        lengths = is_token.sum(dim=-1)
    return Rows(flat_keys, flat_values, positions, attention, index.contiguous(), lengths)


def _tokens(rows: Rows) -> Tensor:
    """[batch, kv_heads, n] bool: entries of ``rows`` that are tokens."""
    n = rows.index.shape[-1]
    return torch.arange(n, device=rows.index.device) < rows.lengths[..., None]
