"""How the ragged storage is read: backends over one slab per layer, and dense prefill attention."""

from reasonalloc.attention.interface import BACKENDS, Backend, SlabView, choose_backend

__all__ = ["BACKENDS", "Backend", "SlabView", "choose_backend"]
