"""Where new tokens stand, and what layers with a window see, for modules that are not told."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reasonalloc.integrations.hf.attention import is_needless
from reasonalloc.integrations.hf.cache import BudgetCache


def new_positions(
    cache: Any, mask: Tensor | None, query: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """[batch or 1, q] int64: real tokens before each new one; what is hidden may have any number.

    Args:
        cache: of the model, or None.
        mask: [batch, 1, q, n] bool as the model made it, or None.
        query: [batch, heads, q, width].
        position_ids: [batch or 1, q], which count the same way in static steps.
    """
    new = query.shape[2]
    if isinstance(cache, BudgetCache):
        if cache.is_static and position_ids is not None:
            return position_ids
        return cache.seen.latest(new, query.shape[0], query.device)
    if mask is None:
        past = 0 if cache is None else cache.get_seq_length()
        return torch.arange(past, past + new, device=query.device)[None]
    return (mask[:, 0, -1].long().cumsum(dim=-1) - 1)[:, -new:]


def new_columns(cache: Any, query: Tensor) -> Tensor:
    """[1, q] int64: the columns of new tokens, before they are stored; arguments as above."""
    past, new = 0 if cache is None else cache.get_seq_length(), query.shape[2]
    if isinstance(cache, BudgetCache):
        past = cache.seen.columns - new
    return torch.arange(past, past + new, device=query.device)[None]


def local_mask(
    cache: Any, layer: int, mask: Tensor | None, query: Tensor, window: int
) -> Tensor | None:
    """[batch or 1, 1, q, n] bool: what a layer sees in a window; None if it sees all that it has.

    Args:
        cache: of the model, before the new tokens are stored, or None.
        layer: index of the layer.
        mask: as the model made it, for layers that see everything.
        query: [batch, heads, q, width].
        window: tokens that a query sees at most, itself included.
    """
    batch, new, device = query.shape[0], query.shape[2], query.device
    visible = None
    if isinstance(cache, BudgetCache):
        kept: Any = cache.layers[layer]
        columns, offset = kept.get_mask_sizes(new)
        if cache.seen.padded:
            places = cache.seen.places(batch, device)
            visible = places[:, None, None, offset : offset + columns] >= 0
    else:
        columns = new if mask is None else mask.shape[-1]
        visible = None if mask is None else mask.bool()
    if visible is None and new == 1 and columns <= window:
        return None
    queries = torch.arange(columns - new, columns, device=device)[:, None]
    keys = torch.arange(columns, device=device)
    seen = (keys <= queries) & (keys > queries - window)
    return seen[None, None] if visible is None else seen & visible


def without_need(mask: Tensor | None) -> Tensor | None:
    """A mask, or None if it was made only because the model cannot go without."""
    return None if mask is None or is_needless(mask) else mask
