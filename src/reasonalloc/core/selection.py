"""Which candidates stay, given scores and integer budgets per (sequence, KV head)."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonalloc.ops.native.budgets import select as native_select
from reasonalloc.ops.native.budgets import usable


def select(
    scores: Tensor,
    lengths: Tensor,
    budgets: Tensor,
    window: int,
    recent_fraction: float = 0.0,
    forced: Tensor | None = None,
) -> Tensor:
    """Keep each head's most recent tokens and, of the others, those with the highest scores.

    ``max(window, floor(recent_fraction * budget))`` most recent tokens stay (fewer if the budget
    is smaller), but never so many that a forced token would have to go. Equal scores: the earlier
    token stays.

    Args:
        scores: [batch, kv_heads, n] float32; entries beyond ``lengths`` are ignored.
        lengths: [batch, kv_heads] int64.
        budgets: [batch, kv_heads] int64, at most ``lengths``.
        window: most recent tokens that stay.
        recent_fraction: see ``Policy.recent_fraction``.
        forced: [batch, kv_heads, n] bool, tokens outside the window that stay whatever their
            scores, or None.

    Returns:
        [batch, kv_heads, n] bool with exactly ``budgets`` true entries per head.
    """
    given = [scores, lengths, budgets] + ([] if forced is None else [forced])
    if usable(*given) and scores.dtype is torch.float32:
        return native_select(scores, lengths, budgets, window, recent_fraction, forced)
    index = torch.arange(scores.shape[-1], device=scores.device)
    recent = torch.floor(budgets.double() * recent_fraction).long().clamp_min(window)
    if forced is not None:
        scores = scores.masked_fill(forced, torch.inf)
        recent = recent.minimum((budgets - forced.sum(dim=-1)).clamp_min(window))
    recent = recent.minimum(budgets)[..., None]
    length = lengths[..., None]
    open_ = index < length - recent
    floor = torch.finfo(scores.dtype).min
    ordered = scores.clamp_min(floor).masked_fill(~open_, -torch.inf)
    order = ordered.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, index.expand_as(order).contiguous())
    best = open_ & (rank < budgets[..., None] - recent)
    return best | ((index >= length - recent) & (index < length))
