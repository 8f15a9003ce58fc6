from __future__ import annotations

from dataclasses import dataclass

from reasonalloc.allocators.layer.base import LAYER_ALLOCATORS, LayerAllocator, LayerQuery


@LAYER_ALLOCATORS.register("uniform", source="the usual default; R-KV, SnapKV, H2O")
@dataclass(frozen=True)
class Uniform(LayerAllocator):
    """As many tokens per KV head in every layer."""

    def allocate(self, query: LayerQuery) -> list[int]:
        return [heads * query.budget for heads in query.heads]
