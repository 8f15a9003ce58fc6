"""Integer budgets with exact sums and bounds (METHOD.md, "robustify")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reasonalloc.ops.native import budgets

_QUANTUM = 1e-6  # fractional parts closer than this tie, and the lower index wins


def robustify(
    demand: Tensor, total: Tensor, lower: Tensor, upper: Tensor, exponent: float
) -> Tensor:
    """``clip(s * demand**exponent, lower, upper)``, ``s`` such that the sum is ``total``, rounded.

    ``s`` is found exactly, not by bisection: the clipped sum is piecewise linear in ``s`` with a
    breakpoint where an entry leaves ``lower`` or reaches ``upper``. No host synchronisation.

    Args:
        demand: [..., n], non-negative.
        total: [...], int64, ``sum(lower) <= total <= sum(upper)``.
        lower: [..., n], int64.
        upper: [..., n], int64, ``lower <= upper``.
        exponent: flattens the demand (below 1) before it is scaled.

    Returns:
        [..., n] int64 budgets: they sum to ``total`` and lie within the bounds.
    """
    if budgets.usable(demand, total, lower, upper):
        return budgets.robustify(demand, total, lower, upper, exponent)
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


def shares_of(
    demand: Tensor | Sequence[float], total: int, lower: int, upper: int, exponent: float
) -> list[int]:
    """``robustify`` with the same bounds for every entry, all in numbers of the host."""
    found = torch.as_tensor(demand, dtype=torch.float64, device="cpu")
    bounds = torch.tensor([total, lower, upper], dtype=torch.int64, device="cpu")
    budgets = robustify(
        found, bounds[0], bounds[1].expand_as(found), bounds[2].expand_as(found), exponent
    )
    return [int(b) for b in budgets]


def round_to_total(values: Tensor, total: Tensor, upper: Tensor) -> Tensor:
    """Largest-remainder rounding: floor all, then raise those with the largest remainders.

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
