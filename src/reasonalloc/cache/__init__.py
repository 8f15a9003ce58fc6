"""Where the tokens live: one slab per layer, its plan in bytes."""

from reasonalloc.cache.plan import LayerShape, MemoryPlan, slab_slots
from reasonalloc.cache.slab import Rows, Slab

__all__ = ["LayerShape", "MemoryPlan", "Rows", "Slab", "slab_slots"]
