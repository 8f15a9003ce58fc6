from __future__ import annotations

from dataclasses import dataclass

from reasonalloc.allocators.layer.base import LAYER_ALLOCATORS, LayerAllocator, LayerQuery
from reasonalloc.allocators.rounding import shares_of
from reasonalloc.errors import UsageError


@LAYER_ALLOCATORS.register("pyramid", source="PyramidKV, arXiv 2406.02069; Pyramid-RKV")
@dataclass(frozen=True)
class Pyramid(LayerAllocator):
    """Budgets that fall linearly with depth: beta sets how far (least = (B - w) / beta)."""

    beta: float = 20.0

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise UsageError(f"pyramid: beta={self.beta} must be at least 1 (1 is uniform)")

    def allocate(self, query: LayerQuery) -> list[int]:
        free = query.budget - query.window
        least = free / self.beta
        most = 2 * free - least
        steps = max(query.layers - 1, 1)
        heads = query.kv_heads
        # One more than the window per head, so that every layer keeps some history.
        lower = min(query.least + heads, heads * query.budget)
        shape = [
            (most - layer * (most - least) / steps + query.window) * heads
            for layer in range(query.layers)
        ]
        return shares_of(shape, query.total, lower, query.total, exponent=1.0)
