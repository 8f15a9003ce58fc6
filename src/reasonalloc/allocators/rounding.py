"""Integer shares of a number with an exact sum, for layer allocators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reasonalloc.ops import TORCH


def shares_of(
    demand: Tensor | Sequence[float],
    total: int,
    lower: int | Sequence[int],
    upper: int | Sequence[int],
    exponent: float,
) -> list[int]:
    """Divide ``total`` as ``Operations.robustify`` does, all in numbers of the host.

    Args:
        demand: [n], non-negative.
        total: what to divide, between the sums of the bounds.
        lower, upper: bounds of every share, or of each.
        exponent: flattens the demand (below 1).
    """
    wanted = torch.as_tensor(demand, dtype=torch.float64, device="cpu")
    whole, least, most = (
        torch.tensor(number, dtype=torch.int64, device="cpu") for number in (total, lower, upper)
    )
    budgets = TORCH.robustify(
        wanted, whole, least.expand_as(wanted), most.expand_as(wanted), exponent
    )
    return [int(b) for b in budgets]
