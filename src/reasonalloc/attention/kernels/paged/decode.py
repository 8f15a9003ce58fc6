"""Attention of one token per row over its runs of pages; see ``pages.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonalloc.attention.kernels.coded import _e4m3
from reasonalloc.attention.kernels.decode import (
    _block,
    _capped,
    _on,
    _share,
    _splits,
    _store_part,
    _weigh,
)
from reasonalloc.attention.kernels.paged.pages import (
    _FLOATS,
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

# How kernels read a page: as it is, as bytes whose bits they take apart, as the GPU's own e4m3.
_AS_IT_IS, _BITS, _E4M3 = 0, 1, 2


@triton.jit
def _tile(pool, at, inside, dim, DIM: tl.constexpr, FORM: tl.constexpr, DTYPE: tl.constexpr):
    """[tokens, dim] of ``DTYPE``, without the scale."""
    x = tl.load(
        pool + at[:, None] + dim[None, :], mask=inside[:, None] & (dim[None, :] < DIM), other=0
    )
    if FORM == 1:
        x = _e4m3(x)  # on any GPU
    elif FORM == 2:
        x = x.to(tl.float8e4nv, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _queries(
    query, row, head, column, query_row, query_head,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """[group, columns] as stored: number ``column`` of a KV head's queries; 0 from ``DIM`` on."""
    group = tl.arange(0, GROUP_PAD)
    return tl.load(
        query + row.to(tl.int64) * query_row
        + (head * GROUP + group)[:, None] * query_head + column[None, :],
        mask=(group[:, None] < GROUP) & (column[None, :] < DIM),
        other=0.0,
    )  # fmt: skip


@triton.jit(do_not_specialize=_VARYING)
def _decode_kernel(
    query, pool, table, seq_lens, slots, first, shift, plain, parts, peaks, sums,
    layer, table_slots, max_blocks, table_stride, query_row, query_head,
    block_stride, layer_stride, head_stride, token_stride, value_at, scaling, softcap,
    HEADS: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seen = tl.load(seq_lens + row)
    if seen <= 0:
        return
    start, moved, own = _entry(
        first, shift, plain, slots, row, head, layer, table_slots, HEADS
    )  # fmt: skip
    begin, end = _share(moved + seen, split, SPLITS, BLOCK)
    if begin >= end:
        return
    table += row.to(tl.int64) * table_stride
    group, dim, column = tl.arange(0, GROUP_PAD), tl.arange(0, DIM_PAD), tl.arange(0, BLOCK)
    q = _queries(query, row, head, dim, query_row, query_head, GROUP, GROUP_PAD, DIM)
    peak = tl.full([GROUP_PAD], -1e30, tl.float32)
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    for at in range(begin, end, BLOCK):
        place = at + column
        inside = place < end
        where = _addresses(
            place, inside, start, own, table, max_blocks, layer, head,
            block_stride, layer_stride, head_stride, token_stride, HEADS, PER_BLOCK, BLOCK_SIZE,
        )  # fmt: skip
        k = _tile(pool, where, inside, dim, DIM, FORM, q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        p, shrink, peak, total = _weigh(_capped(s, softcap, SOFTCAP), peak, total, inside)
        v = _tile(pool, where + value_at, inside, dim, DIM, FORM, q.dtype)
        acc = acc * shrink[:, None] + tl.dot(p.to(q.dtype), v, input_precision="ieee")
    place = (row.to(tl.int64) * HEADS * GROUP + head * GROUP + group) * SPLITS + split
    _store_part(parts, peaks, sums, place, acc, peak, total, dim, group < GROUP, DIM)


@triton.jit(do_not_specialize=[*_VARYING, "splits"])
def _join_kernel(
    parts, peaks, sums, sinks, seq_lens, slots, shift, out, lse,
    layer, table_slots, splits, out_row, out_head, value_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    SPLITS_PAD: tl.constexpr, BLOCK: tl.constexpr, SINKS: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    seen = tl.load(seq_lens + row)
    if seen <= 0:
        return
    split, dim = tl.arange(0, SPLITS_PAD), tl.arange(0, DIM_PAD)
    there = split < splits
    if not ALL:  # programs without tokens stored nothing
        slot = tl.load(slots + row)
        entry = (layer * table_slots + slot).to(tl.int64) * HEADS + head // GROUP
        begin, end = _share(tl.load(shift + entry) + seen, split, splits, BLOCK)
        there = there & (begin < end)
    at = (row.to(tl.int64) * HEADS * GROUP + head) * splits + split
    peak = tl.load(peaks + at, mask=there, other=-1e30)
    total = tl.load(sums + at, mask=there, other=0.0)
    highest = tl.max(peak, axis=0)
    if SINKS:
        sink = tl.load(sinks + head)
        highest = tl.maximum(highest, sink)
    weight = tl.exp(peak - highest)
    whole = tl.sum(total * weight, axis=0)
    if SINKS:
        whole += tl.exp(sink - highest)
    part = tl.load(
        parts + at[:, None] * DIM + dim[None, :],
        mask=there[:, None] & (dim[None, :] < DIM),
        other=0.0,
    )
    result = tl.sum(part * weight[:, None], axis=0) * (value_scale / tl.maximum(whole, 1e-30))
    to = out + row.to(tl.int64) * out_row + head * out_head + dim
    tl.store(to, result.to(out.dtype.element_ty), mask=dim < DIM)
    norm = tl.where(whole > 0, highest + tl.log(whole), float("-inf"))
    tl.store(lse + row.to(tl.int64) * HEADS * GROUP + head, norm)


def decode_splits(rows: int, longest: int, query: Tensor, pool: Pool) -> int:
    """How many parts ``paged_decode`` cuts a run into: a power of two.

    Every number of parts is a kernel of its own, and a server's rows and lengths change all the
    time: so seven kernels are compiled at most.

    Args:
        rows: of the query.
        longest: a bound of the tokens of a run; those of shorter ones are cut as evenly.
        query: any tensor of its type and device.
        pool: the pages.
    """
    block = _block(pool.head_dim, query.element_size())
    return _splits(query.device, max(1, rows * pool.heads), max(1, longest), block)


def scratch_floats(rows: int, query_heads: int, head_dim: int, splits: int) -> int:
    """Numbers that ``paged_decode`` needs room for."""
    return rows * query_heads * splits * (head_dim + 2)


def paged_decode(
    query: Tensor,
    pool: Pool,
    tables: RunTables,
    layer: int,
    block_table: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    out: Tensor,
    lse: Tensor,
    scratch: Tensor,
    splits: int,
    scaling: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Attention of one token per row over its runs, which hold that token already.

    Two launches whose grids follow from ``query``'s shape and ``splits``. Rows of length 0 are
    padding: nothing of them is read, and their ``out`` and ``lse`` stay as they are.

    Args:
        query: [rows, query_heads, head_dim], the heads of a group beside each other; float32,
            float16 or bfloat16, in which products are formed; any strides but the last: 1.
        pool, tables: where the runs are.
        layer: whose.
        block_table: [rows, n] int32, the blocks of each row's request.
        seq_lens: [rows] int32, tokens of each sequence, the new one included.
        slots: [rows] int32, rows of the tables.
        out: as query; is written.
        lse: [rows, query_heads] float32, is written: the natural logarithm of the sum of exp over
            the logits (scaled, then capped) of a head's run and, where there are sinks, its sink;
            -inf over no token without a sink.
        scratch: [at least ``scratch_floats(..)``] float32, contiguous; is overwritten.
        splits: parts of a run, 1 to 64; see ``decode_splits``.
        scaling, softcap: of the logits; softcap 0 for none.
        sinks: [query_heads] float32, logits that stand in the softmax without a value.
        key_scale, value_scale: of e4m3 pages: the number is the stored one times the scale.

    Raises:
        RuntimeError: something has another shape, type or place.
    """
    _runs(pool, tables, layer, block_table, slots, query)
    _attended(query, pool, seq_lens, slots, out, lse, scratch, splits, sinks)
    scale = 1.0 if pool.data.dtype in _FLOATS else value_scale
    scaling *= 1.0 if pool.data.dtype in _FLOATS else key_scale
    _decode(
        query, pool.data, tables.first, tables.shift, tables.plain, block_table, seq_lens, slots,
        sinks, out, lse, scratch, pool.strides, pool.block_size, layer, splits,
        scaling, softcap, scale,
    )  # fmt: skip


def _attended(
    query: Tensor, pool: Pool, seq_lens: Tensor, slots: Tensor, out: Tensor, lse: Tensor,
    scratch: Tensor, splits: int, sinks: Tensor | None,
) -> None:  # fmt: skip
    """Check what attention takes besides runs."""
    rows, query_heads, dim = len(slots), *query.shape[1:]
    shape = (rows, query_heads, pool.head_dim)
    _vectors("query", query, shape, query)
    _vectors("out", out, shape, query)
    _int32("seq_lens", seq_lens, (rows,), query.device)
    f32, device = (torch.float32,), query.device
    _handed("lse", lse, f32, shape[:2], device, lse.is_contiguous())
    _demand(1 <= splits <= 64, f"{splits} splits: there can be 1 to 64")
    floats = max(scratch_floats(rows, query_heads, dim, splits), scratch.numel())
    _handed("scratch", scratch, f32, (floats,), device, scratch.is_contiguous())
    if sinks is not None:
        _handed("sinks", sinks, f32, (query_heads,), device, sinks.is_contiguous())


@torch.library.custom_op("reasonalloc::paged_decode", mutates_args=("out", "lse", "scratch"))
def _decode(
    query: Tensor,
    pool: Tensor,
    first: Tensor,
    shift: Tensor,
    plain: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scratch: Tensor,
    strides: Sequence[int],
    block_size: int,
    layer: int,
    splits: int,
    scaling: float,
    softcap: float,
    value_scale: float,
) -> None:
    """What ``paged_decode`` has checked; not to be called without."""
    rows, query_heads, dim = query.shape
    layers, table_slots, heads = first.shape
    if rows == 0:
        return
    parts, peaks, sums = _buffers(scratch, rows * query_heads * splits, dim)
    group, form = query_heads // heads, _form(pool)
    pool = pool if form == _AS_IT_IS else pool.view(torch.uint8)
    sizes = {"HEADS": heads, "GROUP": group, "DIM": dim}
    sizes["DIM_PAD"] = max(16, triton.next_power_of_2(dim))
    sizes["BLOCK"] = _block(dim, query.element_size())
    with _on(query.device):
        _decode_kernel[(rows, heads, splits)](
            query, pool, block_table, seq_lens, slots, first, shift, plain, parts, peaks, sums,
            layer, table_slots, block_table.shape[1], block_table.stride(0),
            query.stride(0), query.stride(1), *strides, scaling, softcap or 1.0,
            PER_BLOCK=layers * heads, BLOCK_SIZE=block_size,
            GROUP_PAD=max(16, triton.next_power_of_2(group)),  # the least that tl.dot takes
            SPLITS=splits, SOFTCAP=softcap != 0, FORM=form, **_launch(query.dtype), **sizes,
        )  # fmt: skip
        _join_kernel[(rows, query_heads)](
            parts, peaks, sums, lse if sinks is None else sinks, seq_lens, slots, shift, out, lse,
            layer, table_slots, splits, out.stride(0), out.stride(1), value_scale,
            SPLITS_PAD=triton.next_power_of_2(splits), SINKS=sinks is not None, ALL=False,
            num_warps=1 if splits <= 8 else 4, **sizes,
        )  # fmt: skip


@_decode.register_fake
def _(*arguments: object) -> None:
    """Nothing is returned, and nothing is read."""


def _buffers(scratch: Tensor, many: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of ``many`` parts, the peaks of their logits and the sums of their weights."""
    sizes = (many * dim, many, many)
    parts, peaks, sums = scratch[: sum(sizes)].split(sizes)
    return parts, peaks, sums


def _launch(dtype: torch.dtype) -> dict[str, int]:
    """Warps and stages: float32 multiplies in registers; the next tiles of others are under way."""
    slow = dtype == torch.float32
    return {"num_warps": 8 if slow else 4, "num_stages": 2 if slow else 3}


def _form(pool: Tensor) -> int:
    """How the decode kernel reads pages."""
    if pool.dtype in _FLOATS:
        return _AS_IT_IS
    own = pool.is_cuda and torch.cuda.get_device_capability(pool.device) >= (8, 9)
    return _E4M3 if own else _BITS
