"""Layer allocators: integer totals per layer whose sum is ``layers * kv_heads * budget``."""

from reasonalloc.allocators.layer.base import LAYER_ALLOCATORS, LayerAllocator, LayerQuery

__all__ = ["LAYER_ALLOCATORS", "LayerAllocator", "LayerQuery"]
