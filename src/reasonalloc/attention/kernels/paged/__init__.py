"""Attention over runs in a pool of pages, and storing into it, without a table of pages."""

from reasonalloc.attention.kernels.paged.decode import decode_splits, paged_decode, scratch_floats
from reasonalloc.attention.kernels.paged.pages import PLAIN, Pool, RunTables
from reasonalloc.attention.kernels.paged.store import paged_store

__all__ = [
    "PLAIN",
    "Pool",
    "RunTables",
    "decode_splits",
    "paged_decode",
    "paged_store",
    "scratch_floats",
]
