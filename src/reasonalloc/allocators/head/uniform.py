from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reasonalloc.allocators.head.base import HEAD_ALLOCATORS, HeadAllocator, HeadQuery


@HEAD_ALLOCATORS.register("uniform", source="the usual default; R-KV, SnapKV, H2O")
@dataclass(frozen=True)
class Uniform(HeadAllocator):
    """The layer's total split evenly; what does not divide goes to the first heads."""

    equal: ClassVar[bool] = True

    def allocate(self, query: HeadQuery) -> Tensor:
        demand = torch.ones_like(query.lengths)
        lower = torch.zeros_like(query.lengths)
        return query.divide(demand, lower)
