"""Storing new tokens in pages of their runs, and noting queries; see ``pages.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonalloc.attention.kernels.decode import _on
from reasonalloc.attention.kernels.paged.pages import (
    _BYTES,
    _VARYING,
    Pool,
    RunTables,
    _addresses,
    _demand,
    _entry,
    _handed,
    _int32,
    _runs,
    _vectors,
)


@triton.jit
def _to_e4m3(x):
    """Bytes of float32 numbers: the nearest e4m3, the even one of two; 448 for what is above."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 codes are multiples of 2**-9: adding 2**23 rounds to whole ones.
    small = (size * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x != x, 127, code) | ((x.to(tl.int32, bitcast=True) >> 24) & 128)
    return code.to(tl.uint8)


@triton.jit
def _as_stored(x, scale, pool, FP8: tl.constexpr):
    """Numbers as the pool keeps them."""
    return _to_e4m3(tl.div_rn(x.to(tl.float32), scale)) if FP8 else x.to(pool.dtype.element_ty)


@triton.jit(do_not_specialize=_VARYING)
def _store_kernel(
    key, value, query, pool, ring, table, slots, token_row, token_position, ring_row,
    first, shift, plain, layer, table_slots, max_blocks, table_stride,
    key_token, key_head, value_token, value_head, query_token, query_head,
    block_stride, layer_stride, head_stride, token_stride, value_at, key_scale, value_scale,
    ring_width,
    HEADS: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    FP8: tl.constexpr, NOTE: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(token_row + token)
    if row < 0:
        return
    position = tl.load(token_position + token)
    start, moved, own = _entry(
        first, shift, plain, slots, row, head, layer, table_slots, HEADS
    )  # fmt: skip
    table += row.to(tl.int64) * table_stride
    place = moved + position + tl.arange(0, 1)
    at = _addresses(
        place, place >= 0, start, own, table, max_blocks, layer, head,
        block_stride, layer_stride, head_stride, token_stride, HEADS, PER_BLOCK, BLOCK_SIZE,
    )  # fmt: skip
    dim = tl.arange(0, DIM_PAD)
    real = dim < DIM
    k = tl.load(key + token * key_token + head * key_head + dim, mask=real, other=0.0)
    v = tl.load(value + token * value_token + head * value_head + dim, mask=real, other=0.0)
    k, v = _as_stored(k, key_scale, pool, FP8), _as_stored(v, value_scale, pool, FP8)
    to = pool + at[:, None] + dim[None, :]
    mask = (place >= 0)[:, None] & real[None, :]
    tl.store(to, k[None, :], mask=mask)
    tl.store(to + value_at, v[None, :], mask=mask)
    if NOTE:
        noted = tl.load(ring_row + token)
        if noted >= 0:
            group = tl.arange(0, GROUP_PAD)
            which = head * GROUP + group
            asked = (group[:, None] < GROUP) & real[None, :]
            source = query + token * query_token + which[:, None] * query_head + dim[None, :]
            q = tl.load(source, mask=asked, other=0.0)
            entry = (noted.to(tl.int64) * ring_width + position % ring_width) * HEADS * GROUP
            tl.store(ring + (entry + which)[:, None] * DIM + dim[None, :], q, mask=asked)


def paged_store(
    key: Tensor,
    value: Tensor,
    query: Tensor,
    pool: Pool,
    tables: RunTables,
    layer: int,
    block_table: Tensor,
    slots: Tensor,
    token_row: Tensor,
    token_position: Tensor,
    ring: Tensor | None = None,
    ring_row: Tensor | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Write new tokens to the places of their runs, and remember queries.

    Args:
        key, value: [tokens, heads, head_dim], any strides but the last: 1.
        query: [tokens, query_heads, head_dim] of the same type, likewise.
        pool, tables: where the runs are; the pool is written.
        layer: whose.
        block_table: [rows, n] int32, the blocks of each row's request.
        slots: [rows] int32, rows of the tables.
        token_row: [tokens] int32, the row of each token, below ``rows``; -1: padding, nothing is
            done.
        token_position: [tokens] int32, in its sequence.
        ring: [ring_rows, width, query_heads, head_dim] of the query's type, contiguous: that of
            this layer. Position ``p`` is written to ``p % width``.
        ring_row: [tokens] int32, where its query goes; -1: nowhere. With ``ring`` alone.
        key_scale, value_scale: of e4m3 pages: stored is the number divided by the scale.

    Raises:
        RuntimeError: something has another shape, type or place.
    """
    tokens = len(token_row)
    group = _runs(pool, tables, layer, block_table, slots, query)
    narrow = (tokens, pool.heads, pool.head_dim)
    wide = (tokens, pool.heads * group, pool.head_dim)
    _vectors("query", query, wide, query)
    _vectors("key", key, narrow, query)
    _vectors("value", value, narrow, query)
    _int32("token_row", token_row, (tokens,), query.device)
    _int32("token_position", token_position, (tokens,), query.device)
    _demand((ring is None) == (ring_row is None), "ring and ring_row belong together")
    if ring is not None and ring_row is not None:
        _int32("ring_row", ring_row, (tokens,), query.device)
        dtypes, shape = (query.dtype,), (*ring.shape[:2], *wide[1:])
        _handed("ring", ring, dtypes, shape, query.device, ring.is_contiguous())
        _demand(ring.shape[1] > 0, "a ring of no place")
    _store(
        key, value, query, pool.data, tables.first, tables.shift, tables.plain, block_table, slots,
        token_row, token_position, ring, ring_row, pool.strides, pool.block_size, layer,
        key_scale, value_scale,
    )  # fmt: skip


@torch.library.custom_op("reasonalloc::paged_store", mutates_args=("pool", "ring"))
def _store(
    key: Tensor,
    value: Tensor,
    query: Tensor,
    pool: Tensor,
    first: Tensor,
    shift: Tensor,
    plain: Tensor,
    block_table: Tensor,
    slots: Tensor,
    token_row: Tensor,
    token_position: Tensor,
    ring: Tensor | None,
    ring_row: Tensor | None,
    strides: Sequence[int],
    block_size: int,
    layer: int,
    key_scale: float,
    value_scale: float,
) -> None:
    """What ``paged_store`` has checked; not to be called without."""
    tokens, query_heads, dim = query.shape
    layers, table_slots, heads = first.shape
    if tokens == 0:
        return
    fp8 = pool.dtype in _BYTES
    pool = pool.view(torch.uint8) if fp8 else pool
    group = query_heads // heads
    group_pad, dim_pad = triton.next_power_of_2(group), max(16, triton.next_power_of_2(dim))
    with _on(query.device):
        _store_kernel[(tokens, heads)](
            key, value, query, pool, query if ring is None else ring, block_table, slots,
            token_row, token_position, token_row if ring_row is None else ring_row,
            first, shift, plain,
            layer, table_slots, block_table.shape[1], block_table.stride(0),
            key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            query.stride(0), query.stride(1), *strides, key_scale, value_scale,
            1 if ring is None else ring.shape[1],
            HEADS=heads, PER_BLOCK=layers * heads, BLOCK_SIZE=block_size,
            GROUP=group, GROUP_PAD=group_pad, DIM=dim, DIM_PAD=dim_pad, FP8=fp8,
            NOTE=ring is not None, num_warps=4 if group_pad * dim_pad > 1024 else 1,
        )  # fmt: skip


@_store.register_fake
def _(*arguments: object) -> None:
    """Nothing is returned, and nothing is read."""
