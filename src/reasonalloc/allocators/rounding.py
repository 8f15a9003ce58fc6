"""Integer shares of a number with an exact sum, for layer allocators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reasonalloc.ops import TORCH


def shares_of(
    demand: Tensor | Sequence[float], total: int, lower: int, upper: int, exponent: float
) -> list[int]:
    """Divide ``total`` as ``Operations.robustify`` does, all in numbers of the host.

    Args:
        demand: [n], non-negative.
        total: what to divide, ``n * lower <= total <= n * upper``.
        lower, upper: bounds of every share.
        exponent: flattens the demand (below 1).
    """
    wanted = torch.as_tensor(demand, dtype=torch.float64, device="cpu")
    bounds = torch.tensor([total, lower, upper], dtype=torch.int64, device="cpu")
    budgets = TORCH.robustify(
        wanted, bounds[0], bounds[1].expand_as(wanted), bounds[2].expand_as(wanted), exponent
    )
    return [int(b) for b in budgets]
