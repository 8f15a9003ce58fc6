from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from reasonalloc.allocators.head.base import (
    HEAD_ALLOCATORS,
    HeadAllocator,
    HeadQuery,
    check_score_norm,
)
from reasonalloc.errors import UsageError


@HEAD_ALLOCATORS.register("adakv", source="Ada-KV, arXiv 2407.11550 (safeguard 0.2)")
@dataclass(frozen=True)
class AdaKV(HeadAllocator):
    """Counts among the layer's best scores, mixed with an even share as safeguard."""

    safeguard: float = 0.2
    score_norm: str = "length"

    def __post_init__(self) -> None:
        check_score_norm("adakv", self.score_norm)
        if not 0 <= self.safeguard <= 1:
            raise UsageError(f"adakv: safeguard={self.safeguard} must lie between 0 and 1")

    def allocate(self, query: HeadQuery) -> Tensor:
        counts = query.pooled_counts(self.score_norm).double() + query.window
        even = query.total[:, None].double() / counts.shape[1]
        mixed = (1 - self.safeguard) * counts + self.safeguard * even
        lower = query.floor(0.0, 0)
        return query.divide(mixed, lower)
