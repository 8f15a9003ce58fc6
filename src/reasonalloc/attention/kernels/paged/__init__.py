"""Attention over runs in a pool of pages, and storing into it, without a table of pages."""

from reasonalloc.attention.kernels.paged.coded import (
    CodedTables,
    coded_splits,
    paged_decode_coded,
    prepare_coded,
)
from reasonalloc.attention.kernels.paged.decode import decode_splits, paged_decode, scratch_floats
from reasonalloc.attention.kernels.paged.pages import PLAIN, Pool, RunTables
from reasonalloc.attention.kernels.paged.store import paged_store

__all__ = [
    "PLAIN",
    "CodedTables",
    "Pool",
    "RunTables",
    "coded_splits",
    "decode_splits",
    "paged_decode",
    "paged_decode_coded",
    "paged_store",
    "prepare_coded",
    "scratch_floats",
]
