"""Integer budgets that minimise a sum of measured costs."""

from __future__ import annotations

from collections.abc import Callable

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

    dear = float(cost[:, 0].max()) + 1.0
    few, many = taken(dear), taken(0.0)
    if int(many.sum()) < total:  # costs that do not fall any more: the rest goes round
        few, many = many, torch.full_like(many, upper)
    else:
        few, many = _either_side(taken, lambda sizes: int(sizes.sum()) <= total, few, many, dear)
    room = (many - few).clamp_min(0)
    before = room.cumsum(0) - room
    return few + (total - int(few.sum()) - before).clamp_min(0).minimum(room)


def minimise_bytes(
    curves: Tensor, points: Tensor, widths: Tensor, room: int, lower: int, upper: int, fixed: int
) -> tuple[Tensor, Tensor]:
    """Formats and tokens with the least summed cost, in so many bytes.

    A price per byte is sought by bisection, as in ``minimise``: every item takes the format and the
    size at which cost plus price is least. What is left over enlarges items, the lower index first.

    Args:
        curves: [formats, n, points] nats per token, see ``interpolate``.
        points: [points] tokens at which the curves were measured, rising, at least 1.
        widths: [formats] bytes of a token beyond the first ``fixed`` ones of an item.
        room: bytes for those tokens of all items.
        lower, upper: bounds of every item, in tokens, at least ``fixed``.
        fixed: tokens of every item that take the same bytes in every format.

    Returns:
        [n] int64 formats, [n] int64 tokens. The least of everything if ``room`` has not even that.
    """
    sizes = torch.arange(lower, upper + 1, dtype=torch.float64, device="cpu")
    cost = torch.cat([interpolate(own.double(), points.double(), sizes) for own in curves], dim=1)
    size = (widths.double()[:, None] * (sizes - fixed)).flatten()

    def taken(price: float) -> Tensor:
        return (cost + price * size).argmin(dim=1)

    dear = float(cost.max()) + 1.0
    few, many = taken(dear), taken(0.0)
    few, many = _either_side(taken, lambda now: float(size[now].sum()) <= room, few, many, dear)
    left = room - int(size[few].sum())
    for item in range(len(few)):
        more = int(size[many[item]] - size[few[item]])
        if 0 < more <= left:
            few[item], left = many[item], left - more
    formats, tokens = few // len(sizes), lower + few % len(sizes)
    for item in range(len(few)):
        width = int(widths[formats[item]])
        more = min(left // width, upper - int(tokens[item]))
        if more > 0:
            tokens[item] += more
            left -= more * width
    return formats, tokens


def _either_side(
    taken: Callable[[float], Tensor],
    fits: Callable[[Tensor], bool],
    few: Tensor,
    many: Tensor,
    dear: float,
) -> tuple[Tensor, Tensor]:
    """Return what is taken at the lowest price at which it fits, and just below that.

    Args:
        taken: [n] choices at a price.
        fits: whether choices do.
        few, many: those at the price ``dear`` and at 0.
    """
    cheap = 0.0
    for _ in range(_STEPS):
        price = (dear + cheap) / 2
        now = taken(price)
        if fits(now):
            dear, few = price, now
        else:
            cheap, many = price, now
    return few, many
