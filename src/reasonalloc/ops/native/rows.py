"""``rows.cpp``: move what stays to its new place."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonalloc.ops.native.build import library
from reasonalloc.ops.native.check import address


def move_rows(own: Tensor, flat: Tensor, index: Tensor, keep: Tensor, offsets: Tensor) -> None:
    """Write the kept rows of ``flat`` into the runs of ``own``, in their order.

    Args:
        own: [batch, slots, ...], contiguous, changed in the new runs alone.
        flat: [batch, m, ...] of the same type and row; may be ``own``.
        index: [batch, kv_heads, n] int64, places in ``flat``.
        keep: [batch, kv_heads, n] bool.
        offsets: [batch, kv_heads] int64, first slot of each run.

    Raises:
        RuntimeError: an argument is not so, a run would end behind the storage, or a row comes from
            outside of it.
    """
    batch, kv_heads, n = index.shape
    flat, index, keep, offsets = (t.contiguous() for t in (flat, index, keep, offsets))
    slots, stored, row = own.shape[1], flat.shape[1], own.shape[2:]
    refused = library().reasonalloc_move_rows(
        address("own", own, own.dtype, (batch, slots, *row)),
        address("flat", flat, own.dtype, (batch, stored, *row)),
        address("index", index, torch.int64, (batch, kv_heads, n)),
        address("keep", keep, torch.bool, (batch, kv_heads, n)),
        address("offsets", offsets, torch.int64, (batch, kv_heads)),
        batch,
        kv_heads,
        n,
        slots,
        stored,
        row.numel() * own.element_size(),
        torch.get_num_threads(),
    )
    if refused:
        raise RuntimeError(
            f"a run ends behind its storage of {slots} slots, or a row comes from outside of its "
            f"{stored}"
        )
