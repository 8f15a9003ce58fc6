"""Attention over runs in a pool of pages, and storing into it, without a table of pages.

A block of the pool holds ``block_size`` tokens of every (layer, KV head): ``L * H`` pages. The
pages of a request are numbered through its blocks: page ``g`` is the ``g % (L * H)``-th (layer,
head) of its block ``g // (L * H)``. A run is one head's tokens, in order. Page ``i`` of the run of
(layer, head) is request page

- ``i * L * H + layer * H + h`` if ``i < plain``, as in a cache that is not compressed,
- ``plain * L * H + first + i - plain`` if not.

``plain`` is ``PLAIN`` while a request is not compressed, and the full blocks of a prompt that
stays. A run holds ``shift`` plus the tokens of its sequence.

The kernels compute this themselves. All lengths are read on the device and no grid depends on
them, so a step never waits for the host and can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

PLAIN = 1 << 30  # more pages than any run has
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_BYTES = (torch.float8_e4m3fn, torch.uint8)  # vLLM keeps e4m3 numbers as either
# How kernels read a page: as it is, as bytes whose bits they take apart, as the GPU's own e4m3.
_AS_IT_IS, _BITS, _E4M3 = 0, 1, 2
_VARYING = ["layer", "table_slots", "max_blocks", "table_stride"]  # one kernel for all of them


@triton.jit
def _entry(first, shift, plain, slots, row, head, layer, table_slots, HEADS: tl.constexpr):
    """First page behind the plain ones, shift and plain pages of a run."""
    slot = tl.load(slots + row)
    at = (layer * table_slots + slot).to(tl.int64) * HEADS + head
    return tl.load(first + at), tl.load(shift + at), tl.load(plain + slot)


@triton.jit
def _addresses(
    place, inside, first, plain, table, max_blocks, layer, head,
    block_stride, layer_stride, head_stride, token_stride,
    HEADS: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """int64 elements from the pool's start of the keys at ``place`` of a run.

    Numbers of pages never become numbers of request pages, which would overflow: both summands of
    ``plain * L * H + behind`` are divided by ``L * H`` on their own.
    """
    page = place // BLOCK_SIZE
    behind = first + tl.maximum(page - plain, 0)
    own = page < plain
    index = tl.where(own, page, plain + behind // PER_BLOCK)
    which = tl.where(own, layer * HEADS + head, behind % PER_BLOCK)
    # What lies in no block of the request goes to block 0, which holds nothing.
    block = tl.load(table + index, mask=inside & (index < max_blocks), other=0).to(tl.int64)
    at = block * block_stride + (which // HEADS).to(tl.int64) * layer_stride
    at += (which % HEADS).to(tl.int64) * head_stride
    return at + (place % BLOCK_SIZE).to(tl.int64) * token_stride


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
    q = tl.load(
        query + row.to(tl.int64) * query_row
        + (head * GROUP + group)[:, None] * query_head + dim[None, :],
        mask=(group[:, None] < GROUP) & (dim[None, :] < DIM),
        other=0.0,
    )  # fmt: skip
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
    _store_part(parts, peaks, sums, place, acc, peak, total, dim, GROUP, GROUP_PAD, DIM)


@triton.jit(do_not_specialize=_VARYING)
def _join_kernel(
    parts, peaks, sums, sinks, seq_lens, slots, shift, out, lse,
    layer, table_slots, out_row, out_head, value_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr, BLOCK: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    seen = tl.load(seq_lens + row)
    if seen <= 0:
        return
    slot = tl.load(slots + row)
    entry = (layer * table_slots + slot).to(tl.int64) * HEADS + head // GROUP
    length = tl.load(shift + entry) + seen
    split, dim = tl.arange(0, SPLITS_PAD), tl.arange(0, DIM_PAD)
    begin, end = _share(length, split, SPLITS, BLOCK)
    there = (split < SPLITS) & (begin < end)  # other programs stored nothing
    at = (row.to(tl.int64) * HEADS * GROUP + head) * SPLITS + split
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
    return _to_e4m3(x.to(tl.float32) / scale) if FP8 else x.to(pool.dtype.element_ty)


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


@dataclass(frozen=True)
class Pool:
    """The pages of all layers.

    The key of token ``t`` of page (layer, head) of a block begins ``block * block_stride + layer *
    layer_stride + head * head_stride + t * token_stride`` elements behind the first element of
    ``data``, its value ``value_at`` behind its key.

    Attributes:
        data: of any shape; float32, float16 or bfloat16, or e4m3 numbers as such or as uint8.
        layers, heads, block_size, head_dim: sizes.
        block_stride, layer_stride, head_stride, token_stride, value_at: in elements.

    Raises:
        RuntimeError: not one block lies in ``data``, or its type is another.
    """

    data: Tensor
    layers: int
    heads: int
    block_size: int
    head_dim: int
    block_stride: int
    layer_stride: int
    head_stride: int
    token_stride: int
    value_at: int

    def __post_init__(self) -> None:
        _demand(
            self.data.dtype in (*_FLOATS, *_BYTES),
            f"a pool of {self.data.dtype}: kernels read float32, float16, bfloat16 and e4m3",
        )
        sizes = (self.layers, self.heads, self.block_size, self.head_dim)
        _demand(
            min(sizes) > 0 and min(self.strides) >= 0 and self.block_stride > 0,
            f"a pool of {sizes} (layers, heads, block size, head size) and strides {self.strides}",
        )
        _demand(
            self.blocks > 0,
            f"no block of {self._inside} elements lies in a pool of {list(self.data.shape)} with "
            f"strides {list(self.data.stride())}",
        )

    @classmethod
    def of(cls, pages: Tensor) -> Pool:
        """A pool whose keys and values lie beside each other.

        Args:
            pages: [blocks, layers, heads, block_size, 2 * head_dim], any strides but the last: 1.
        """
        _demand(
            pages.dim() == 5 and pages.stride(4) == 1 and pages.shape[4] % 2 == 0,
            f"pages {list(pages.shape)} with strides {list(pages.stride())}: not [blocks, layers, "
            "heads, block_size, 2 * head_dim] with a last stride of 1",
        )
        _, layers, heads, block_size, both = pages.shape
        block, layer, head, token, _ = pages.stride()
        dim = both // 2
        return cls(pages, layers, heads, block_size, dim, block, layer, head, token, dim)

    @property
    def strides(self) -> tuple[int, int, int, int, int]:
        """Of blocks, layers, heads and tokens, and from a key to its value."""
        inner = (self.layer_stride, self.head_stride, self.token_stride, self.value_at)
        return (self.block_stride, *inner)

    @property
    def blocks(self) -> int:
        """How many lie in ``data``."""
        shape, stride = self.data.shape, self.data.stride()
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        return 1 + (min(extent, self.data.numel() * extent) - self._inside) // self.block_stride

    @property
    def _inside(self) -> int:
        """Elements from the first of a block to its last."""
        last = (self.layers - 1) * self.layer_stride + (self.heads - 1) * self.head_stride
        last += (self.block_size - 1) * self.token_stride
        return last + self.value_at + self.head_dim


@dataclass(frozen=True)
class RunTables:
    """Where the runs of all requests lie; a request has a slot.

    Attributes:
        first: [layers, slots, heads] int32, the first page behind the plain ones.
        shift: [layers, slots, heads] int32, tokens of the run less those of its sequence.
        plain: [slots] int32.

    Raises:
        RuntimeError: they are something else.
    """

    first: Tensor
    shift: Tensor
    plain: Tensor

    def __post_init__(self) -> None:
        device, slots = self.first.device, self.first.shape[1:2]
        _int32("first", self.first, (*self.first.shape[:1], *slots, *self.first.shape[2:3]), device)
        _int32("shift", self.shift, self.first.shape, device)
        _int32("plain", self.plain, slots, device)


def _demand(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def _int32(name: str, tensor: Tensor, shape: Sequence[int], device: torch.device) -> None:
    _handed(name, tensor, (torch.int32,), shape, device, tensor.is_contiguous())


def _handed(
    name: str,
    tensor: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int],
    device: torch.device,
    laid: bool,
) -> None:
    """Refuse what a kernel would take for something else; ``laid``: the strides are right."""
    if tensor.dtype in dtypes and laid and tensor.shape == tuple(shape) and tensor.device == device:
        return
    raise RuntimeError(
        f"{name} cannot be handed to a kernel: it must be {list(shape)} of "
        f"{' or '.join(map(str, dtypes))} on {device}, its last dimensions contiguous, but it is "
        f"{list(tensor.shape)} of {tensor.dtype} with strides {list(tensor.stride())} on "
        f"{tensor.device}"
    )


def _vectors(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """[.., head_dim] of floats with any strides but the last: 1."""
    _handed(name, tensor, (like.dtype,), shape, like.device, tensor.stride(-1) == 1)


def _runs(
    pool: Pool, tables: RunTables, layer: int, block_table: Tensor, slots: Tensor, query: Tensor
) -> int:
    """Check what both launchers take; returns the group."""
    rows, device = len(slots), query.device
    _demand(
        query.dim() == 3 and query.dtype in _FLOATS and query.shape[1] % pool.heads == 0,
        f"query {list(query.shape)} of {query.dtype} over {pool.heads} KV heads: it must be [n, "
        "query_heads, head_dim] of float32, float16 or bfloat16, the heads a multiple",
    )
    shape = (pool.layers, len(tables.plain), pool.heads)
    _demand(
        tables.first.shape == shape and tables.first.device == device,
        f"tables {list(tables.first.shape)} on {tables.first.device} for a pool of {list(shape)} "
        f"(layers, slots, heads) and a query on {device}",
    )
    _demand(pool.data.device == device, f"a pool on {pool.data.device} for a query on {device}")
    _demand(0 <= layer < pool.layers, f"layer {layer} of {pool.layers}")
    _int32("slots", slots, (rows,), device)
    contiguous = block_table.dim() == 2 and block_table.stride(1) == 1
    wide = (rows, block_table.shape[-1])
    _handed("block_table", block_table, (torch.int32,), wide, device, contiguous)
    return query.shape[1] // pool.heads


def decode_splits(rows: int, longest: int, query: Tensor, pool: Pool) -> int:
    """How many parts ``paged_decode`` cuts a run into.

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
    scale = 1.0 if pool.data.dtype in _FLOATS else value_scale
    scaling *= 1.0 if pool.data.dtype in _FLOATS else key_scale
    _decode(
        query, pool.data, tables.first, tables.shift, tables.plain, block_table, seq_lens, slots,
        sinks, out, lse, scratch, pool.strides, pool.block_size, layer, splits,
        scaling, softcap, scale,
    )  # fmt: skip


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
    many = rows * query_heads * splits
    parts, peaks, sums, _ = scratch.split(
        [many * dim, many, many, scratch.numel() - many * (dim + 2)]
    )
    group, form = query_heads // heads, _form(pool)
    pool = pool if form == _AS_IT_IS else pool.view(torch.uint8)
    sizes = {"HEADS": heads, "GROUP": group, "DIM": dim, "SPLITS": splits}
    sizes["DIM_PAD"] = max(16, triton.next_power_of_2(dim))
    sizes["BLOCK"] = _block(dim, query.element_size())
    with _on(query.device):
        _decode_kernel[(rows, heads, splits)](
            query, pool, block_table, seq_lens, slots, first, shift, plain, parts, peaks, sums,
            layer, table_slots, block_table.shape[1], block_table.stride(0),
            query.stride(0), query.stride(1), *strides, scaling, softcap or 1.0,
            PER_BLOCK=layers * heads, BLOCK_SIZE=block_size,
            GROUP_PAD=max(16, triton.next_power_of_2(group)),  # the least that tl.dot takes
            SOFTCAP=softcap != 0, FORM=form, **_launch(query.dtype), **sizes,
        )  # fmt: skip
        _join_kernel[(rows, query_heads)](
            parts, peaks, sums, lse if sinks is None else sinks, seq_lens, slots, shift, out, lse,
            layer, table_slots, out.stride(0), out.stride(1), value_scale,
            SPLITS_PAD=triton.next_power_of_2(splits), SINKS=sinks is not None,
            num_warps=1 if splits <= 8 else 4, **sizes,
        )  # fmt: skip


@_decode.register_fake
def _(*arguments: object) -> None:
    """Nothing is returned, and nothing is read."""


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
