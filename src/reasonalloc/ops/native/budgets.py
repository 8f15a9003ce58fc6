"""``budgets.cpp``: what a boundary decides, without the dozens of small operations of PyTorch.

The results are those of ``ops.torch``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reasonalloc.ops.native.build import library
from reasonalloc.ops.native.check import address, failure


def robustify(
    demand: Tensor, total: Tensor, lower: Tensor, upper: Tensor, exponent: float
) -> Tensor:
    """See ``Operations.robustify``."""
    shape = torch.broadcast_shapes(demand.shape, lower.shape, upper.shape)
    demand = demand.double().expand(shape).contiguous()
    lower, upper = (t.long().expand(shape).contiguous() for t in (lower, upper))
    total = total.long().expand(shape[:-1]).contiguous()
    budgets = torch.empty(shape, dtype=torch.int64, device="cpu")
    _check(
        library().reasonalloc_robustify(
            address("demand", demand, torch.float64, shape),
            address("total", total, torch.int64, shape[:-1]),
            address("lower", lower, torch.int64, shape),
            address("upper", upper, torch.int64, shape),
            exponent,
            total.numel(),
            shape[-1],
            budgets.data_ptr(),
        )
    )
    return budgets


def pooled_counts(
    scores: Tensor, lengths: Tensor, total: Tensor, window: int, scaled: bool
) -> Tensor:
    """See ``Operations.pooled_counts``."""
    batch, heads, n = scores.shape
    scores = scores.contiguous()
    lengths, total = (t.long().contiguous() for t in (lengths, total))
    counts = torch.empty(batch, heads, dtype=torch.int64, device="cpu")
    _check(
        library().reasonalloc_pooled_counts(
            address("scores", scores, torch.float32, (batch, heads, n)),
            address("lengths", lengths, torch.int64, (batch, heads)),
            address("total", total, torch.int64, (batch,)),
            window,
            scaled,
            batch,
            heads,
            n,
            counts.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return counts


def select(
    scores: Tensor,
    lengths: Tensor,
    budgets: Tensor,
    window: int,
    recent_fraction: float,
    forced: Tensor | None,
) -> Tensor:
    """See ``Operations.select``."""
    *runs, n = scores.shape
    scores = scores.contiguous()
    lengths, budgets = (t.long().contiguous() for t in (lengths, budgets))
    forced = None if forced is None else forced.bool().expand(scores.shape).contiguous()
    keep = torch.empty(scores.shape, dtype=torch.bool, device="cpu")
    _check(
        library().reasonalloc_select(
            address("scores", scores, torch.float32, (*runs, n)),
            address("lengths", lengths, torch.int64, runs),
            address("budgets", budgets, torch.int64, runs),
            window,
            recent_fraction,
            None if forced is None else forced.data_ptr(),
            lengths.numel(),
            n,
            keep.data_ptr(),
            torch.get_num_threads(),
        )
    )
    return keep


def _check(failed: int) -> None:
    if failed:
        raise failure(failed)
