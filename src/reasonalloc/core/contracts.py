"""What policies and head allocators return, checked where they are not the library's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reasonalloc.allocators.head import HeadAllocator, HeadQuery
from reasonalloc.errors import UsageError
from reasonalloc.policies import Policy


def check_scores(policy: Policy, scores: Any, shape: torch.Size) -> None:
    """Refuse scores that say nothing about some token.

    Raises:
        UsageError: names the policy, what it returned and what it should.
    """
    name = f"policy {type(policy).__name__!r}"
    if not isinstance(scores, Tensor) or scores.shape != shape:
        raise UsageError(
            f"{name}: score() returned {_kind(scores)}: return a tensor of shape {list(shape)}, "
            "[batch, kv_heads, n]"
        )
    if bool(scores.isnan().any()):
        raise UsageError(f"{name}: score() returned NaN: return numbers, -inf for what may go")


def check_budgets(heads: HeadAllocator, budgets: Any, query: HeadQuery) -> None:
    """Refuse budgets that cannot be kept.

    Raises:
        UsageError: names the allocator, what it returned and what it should.
    """
    name, shape = f"head allocator {type(heads).__name__!r}", query.lengths.shape
    whole = isinstance(budgets, Tensor) and budgets.dtype is torch.int64
    if not whole or budgets.shape != shape:
        raise UsageError(
            f"{name}: allocate() returned {_kind(budgets)}: return int64 of shape {list(shape)}, "
            "[batch, kv_heads]"
        )
    least = query.floor(0.0, 0)
    fits = (budgets >= least) & (budgets <= query.lengths)
    if not bool(fits.all()) or not torch.equal(budgets.sum(dim=1), query.total):
        raise UsageError(
            f"{name}: allocate() returned {budgets.tolist()}: each number must lie between "
            f"{least.tolist()} and {query.lengths.tolist()}, and those of a sequence must sum to "
            f"{query.total.tolist()} (HeadQuery.divide does)"
        )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
