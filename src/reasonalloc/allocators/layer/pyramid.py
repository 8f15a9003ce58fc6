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
        # One more than the window per head, so that every layer keeps some history.
        kept = min(query.window + query.n_sink + 1, query.budget)
        lower = [heads * kept for heads in query.heads]
        shape = [
            (most - layer * (most - least) / steps + query.window) * heads
            for layer, heads in enumerate(query.heads)
        ]
        return shares_of(shape, query.total, lower, query.total, exponent=1.0)
