"""Where the tokens live: one slab per layer."""

from reasonalloc.cache.slab import Rows, Slab

__all__ = ["Rows", "Slab"]
