"""Integer budgets that minimise a sum of measured costs."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_COST = 1e-9  # nats per token; a cost below cannot be told from rounding errors
_STEPS = 80  # of the bisection over the price of a token


def interpolate(curves: Tensor, points: Tensor, sizes: Tensor) -> Tensor:
    """Costs at any size: straight lines in log-log, made falling, extended by the last slope.

    Args:
        curves: [n, points] float64, cost of each item at each point.
        points: [points] float64, rising.
        sizes: [m] float64; below the first point the first slope goes on.

    Returns:
        [n, m] float64.
    """
    cost = curves.clamp_min(_LEAST_COST).cummin(dim=1).values.log()
    x, at = points.log(), sizes.log()
    left = (torch.searchsorted(x, at, right=True) - 1).clamp(0, len(x) - 2)
    share = (at - x[left]) / (x[left + 1] - x[left])
    return (cost[:, left] + share * (cost[:, left + 1] - cost[:, left])).exp()


def minimise(curves: Tensor, points: Tensor, total: int, lower: int, upper: int) -> Tensor:
    """Budgets with ``sum == total`` and the least summed cost within the bounds.

    A price per token is sought by bisection; every item takes the size at which cost plus price is
    least, which is optimal on the curves' lower convex hulls. Items that a slightly lower price
    would enlarge share the rest, the lower index first.

    Args:
        curves: [n, points] nats per token, see ``interpolate``.
        points: [points] tokens at which the curves were measured, rising, at least 1.
        total: tokens to give, ``n * lower <= total <= n * upper``.
        lower, upper: bounds of every item, at least 1.

    Returns:
        [n] int64.
    """
    sizes = torch.arange(lower, upper + 1, dtype=torch.float64, device="cpu")
    cost = interpolate(curves.double(), points.double(), sizes)

    def taken(price: float) -> Tensor:
        return lower + (cost + price * sizes).argmin(dim=1)

    dear, cheap = float(cost[:, 0].max()) + 1.0, 0.0
    few, many = taken(dear), taken(cheap)
    if int(many.sum()) < total:  # costs that do not fall any more: the rest goes round
        few, many = many, torch.full_like(many, upper)
    else:
        for _ in range(_STEPS):
            price = (dear + cheap) / 2
            sizes_now = taken(price)
            if int(sizes_now.sum()) <= total:
                dear, few = price, sizes_now
            else:
                cheap, many = price, sizes_now
    room = (many - few).clamp_min(0)
    before = room.cumsum(0) - room
    return few + (total - int(few.sum()) - before).clamp_min(0).minimum(room)
