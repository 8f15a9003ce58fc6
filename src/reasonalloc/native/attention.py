"""``attention.cpp`` as a PyTorch operator, opaque to PyTorch's own compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reasonalloc.attention.interface import SlabView
from reasonalloc.native.build import kind, library

_operators = torch.library.Library("reasonalloc", "FRAGMENT")
_operators.define(
    "ragged_decode(Tensor query, Tensor keys, Tensor values, Tensor offsets, Tensor lengths, "
    "float scaling, float softcap, bool need_weights) -> (Tensor, Tensor)"
)


def decode(
    query: Tensor, slab: SlabView, scaling: float, softcap: float | None, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """See ``Backend.decode``; softmax and sums are in float32, an empty run gives zeros."""
    out, received = torch.ops.reasonalloc.ragged_decode(
        query,
        slab.keys,
        slab.values,
        slab.offsets,
        slab.lengths,
        scaling,
        softcap or 0.0,
        need_weights,
    )
    return out, received if need_weights else None


def _results(query: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Empty results, for arguments of the operator of which the last is ``need_weights``."""
    need_weights = rest[-1]
    received = keys.new_empty(keys.shape[:2] if need_weights else (0,), dtype=torch.float32)
    return values.new_empty(*query.shape[:3], values.shape[2]), received


torch.library.register_fake("reasonalloc::ragged_decode", _results, lib=_operators)


def _ragged_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    scaling: float,
    softcap: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes as of ``Backend.decode``; keys, values and lengths are contiguous."""
    out, received = _results(query, keys, values, need_weights)
    query, offsets = query.float().contiguous(), offsets.contiguous()
    batch, query_heads, _, head_dim = query.shape
    kv_heads = lengths.shape[1]
    library().reasonalloc_ragged_decode(
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        offsets.data_ptr(),
        lengths.data_ptr(),
        out.data_ptr(),
        received.data_ptr() if need_weights else None,
        batch,
        kv_heads,
        query_heads // kv_heads,
        keys.shape[1],
        head_dim,
        values.shape[2],
        scaling,
        softcap,
        kind(keys.dtype),
        kind(values.dtype),
        torch.get_num_threads(),
    )
    return out, received


_operators.impl("ragged_decode", _ragged_decode, "CPU")
