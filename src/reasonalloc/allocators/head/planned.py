from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from reasonalloc.allocators.head.base import HEAD_ALLOCATORS, HeadAllocator, HeadQuery


@HEAD_ALLOCATORS.register("planned", source="ours: budgets per (layer, head) known beforehand")
@dataclass(frozen=True)
class Planned(HeadAllocator):
    """What the layer allocator planned for each head; what a short head leaves, others use."""

    needs_plan: ClassVar[bool] = True

    def allocate(self, query: HeadQuery) -> Tensor:
        if query.planned is None:
            raise RuntimeError("heads='planned' without a plan")
        demand = query.planned.expand_as(query.lengths)
        lower = query.floor(0.0, 0)
        return query.divide(demand, lower)
