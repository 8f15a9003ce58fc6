from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reasonalloc.allocators.head.base import (
    HEAD_ALLOCATORS,
    HeadAllocator,
    HeadQuery,
    check_score_norm,
)
from reasonalloc.allocators.power import check_power
from reasonalloc.errors import UsageError


@HEAD_ALLOCATORS.register("reasonalloc", source="ReasonAlloc, arXiv 2606.11164 (level 2)")
@dataclass(frozen=True)
class ReasonAllocHeads(HeadAllocator):
    """Counts above the layer's pooled threshold to the power beta, floored, sum exact."""

    beta: float = 0.5
    mu: float = 0.25
    margin: int = 8
    score_norm: str = "length"

    def __post_init__(self) -> None:
        check_score_norm("reasonalloc", self.score_norm)
        if not 0 <= self.mu <= 1:
            raise UsageError(f"reasonalloc: mu={self.mu} must lie between 0 and 1")
        if self.margin < 0:
            raise UsageError(f"reasonalloc: margin={self.margin} must not be negative")
        check_power("reasonalloc", "beta", self.beta)

    def allocate(self, query: HeadQuery) -> Tensor:
        demand = query.pooled_counts(self.score_norm) + query.window
        lower = query.floor(self.mu, self.margin)
        return query.divide(demand, lower, self.beta)
