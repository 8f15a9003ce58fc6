"""Where the tokens live: one slab per layer."""

from reasonalloc.cache.coded import CodedSlab
from reasonalloc.cache.slab import Rows, Slab

__all__ = ["AnySlab", "CodedSlab", "Rows", "Slab"]

AnySlab = Slab | CodedSlab
