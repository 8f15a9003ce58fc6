"""The reference of every operation, in plain PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reasonalloc.ops.interface import Operations

_QUANTUM = 1e-6  # fractional parts closer than this tie, and the lower index wins


class TorchOperations(Operations):
    """Plain PyTorch."""

    def robustify(
        self, demand: Tensor, total: Tensor, lower: Tensor, upper: Tensor, exponent: float
    ) -> Tensor:
        """See ``Operations.robustify``."""
        weight = demand.double().clamp_min(1e-12) ** exponent
        low, high = lower.double(), upper.double()
        breakpoints = torch.cat([low / weight, high / weight], dim=-1).sort(dim=-1).values
        sums = torch.clamp(
            breakpoints.unsqueeze(-1) * weight.unsqueeze(-2), low.unsqueeze(-2), high.unsqueeze(-2)
        ).sum(-1)
        last = breakpoints.shape[-1] - 1
        goal = total.double().unsqueeze(-1)
        left = ((sums <= goal).sum(-1, keepdim=True) - 1).clamp(0, last)
        right = (left + 1).clamp_max(last)
        s_left, s_right = breakpoints.gather(-1, left), breakpoints.gather(-1, right)
        f_left, f_right = sums.gather(-1, left), sums.gather(-1, right)
        rise = f_right - f_left
        step = torch.where(rise > 0, (goal - f_left) / rise.clamp_min(1e-300), 0.0).clamp(0, 1)
        scale = s_left + step * (s_right - s_left)
        return round_to_total(torch.clamp(scale * weight, low, high), total, upper)

    def pooled_counts(
        self, scores: Tensor, lengths: Tensor, total: Tensor, window: int, scaled: bool
    ) -> Tensor:
        """See ``Operations.pooled_counts``."""
        batch, heads, n = scores.shape
        if scaled:
            scores = scores * (lengths - window).clamp_min(1)[..., None]
        flat = scores.reshape(batch, heads * n)
        k = (total - heads * window).clamp_min(0)
        ordered = flat.sort(dim=-1, descending=True).values
        tau = ordered.gather(1, (k - 1).clamp(0, heads * n - 1)[:, None])
        chosen = (scores >= tau[..., None]) & (scores > -torch.inf)
        return chosen.sum(-1) * (k > 0).long()[:, None]

    def select(
        self,
        scores: Tensor,
        lengths: Tensor,
        budgets: Tensor,
        window: int,
        recent_fraction: float = 0.0,
        forced: Tensor | None = None,
    ) -> Tensor:
        """See ``Operations.select``."""
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

    def move(
        self,
        tensors: Sequence[tuple[Tensor, Tensor]],
        index: Tensor,
        keep: Tensor,
        offsets: Tensor,
    ) -> None:
        """See ``Operations.move``; every slot is written, also between the runs."""
        batch, slots = tensors[0][0].shape[:2]
        target = (offsets[..., None] + keep.cumsum(dim=-1) - 1).masked_fill(~keep, slots)
        source = torch.zeros(batch, slots + 1, dtype=torch.int64, device=keep.device)
        # What goes is sent to one slot too many.
        source = source.scatter_(1, target.flatten(1), index.flatten(1))[:, :-1]
        for own, flat in tensors:
            own.copy_(take(flat, source))


TORCH = TorchOperations()


def take(flat: Tensor, index: Tensor) -> Tensor:
    """Return [batch, m, ...] at [batch, n]: whole rows, several times faster than gather."""
    batch, stored = flat.shape[:2]
    start = torch.arange(batch, device=index.device)[:, None] * stored
    taken = flat.reshape(batch * stored, *flat.shape[2:]).index_select(0, (index + start).flatten())
    return taken.view(*index.shape, *flat.shape[2:])


def round_to_total(values: Tensor, total: Tensor, upper: Tensor) -> Tensor:
    """Round by largest remainders: floor all, then raise those with the largest remainders.

    Args:
        values: [..., n] float64 with ``sum(values)`` equal to ``total`` up to rounding errors.
        total: [...], int64.
        upper: [..., n], int64; no entry is raised above it.

    Returns:
        [..., n] int64 that sums to ``total``. Equal remainders: the lower index is raised.
    """
    base = torch.floor(values + _QUANTUM / 2).long().minimum(upper)
    remainder = torch.round((values - base) / _QUANTUM)
    remainder = remainder.masked_fill(base >= upper, -torch.inf)
    order = torch.argsort(remainder, dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order).contiguous()
    )
    missing = (total - base.sum(-1)).unsqueeze(-1)
    return base + (rank < missing).long()
