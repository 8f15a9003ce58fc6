from __future__ import annotations

from dataclasses import dataclass

from reasonalloc.allocators.layer.base import LAYER_ALLOCATORS, LayerAllocator, LayerQuery


@LAYER_ALLOCATORS.register("uniform", source="the usual default; R-KV, SnapKV, H2O")
@dataclass(frozen=True)
class Uniform(LayerAllocator):
    """The same total for every layer."""

    def allocate(self, query: LayerQuery) -> list[int]:
        return [query.kv_heads * query.budget] * query.layers
