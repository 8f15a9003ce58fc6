"""``rows.cpp``: move what stays to its new place."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonalloc.native.build import library


def move_rows(own: Tensor, flat: Tensor, index: Tensor, keep: Tensor, offsets: Tensor) -> None:
    """Write the kept rows of ``flat`` into the runs of ``own``, in their order.

    Args:
        own: [batch, slots, ...], contiguous, changed in the new runs alone.
        flat: [batch, m, ...] of the same type and row; may be ``own``.
        index: [batch, kv_heads, n] int64, places in ``flat``.
        keep: [batch, kv_heads, n] bool.
        offsets: [batch, kv_heads] int64, first slot of each run.

    Raises:
        RuntimeError: the types differ, or a run would end behind the storage.
    """
    batch, kv_heads, n = index.shape
    flat, index, keep, offsets = (t.contiguous() for t in (flat, index, keep, offsets))
    if own.dtype != flat.dtype or own.shape[2:] != flat.shape[2:]:
        raise RuntimeError(f"rows of {flat.dtype} {flat.shape} into {own.dtype} {own.shape}")
    refused = library().reasonalloc_move_rows(
        own.data_ptr(),
        flat.data_ptr(),
        index.data_ptr(),
        keep.data_ptr(),
        offsets.data_ptr(),
        batch,
        kv_heads,
        n,
        own.shape[1],
        flat.shape[1],
        own.stride(1) * own.element_size(),
        torch.get_num_threads(),
    )
    if refused:
        raise RuntimeError(f"a run ends behind its storage of {own.shape[1]} slots")
