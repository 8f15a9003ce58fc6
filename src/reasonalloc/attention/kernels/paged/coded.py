"""Attention of one token per row over runs of pages that begin with coded ones.

Pages of a run are numbered as in ``pages.py``. Its first ``coded`` tokens lie in its first pages,
as ``ops/page_rows.py`` lays them out: token ``i`` in page ``i // per_page``. The page behind them
begins a plain tail, at place ``begin`` = coded pages * ``block_size``. Places go on from there, and
``shift`` counts them: a tail ends at ``shift`` plus the tokens of its sequence, so that
``paged_store`` needs to know nothing of codes. A request that is not compressed has no coded token,
and its tails begin at 0.

A program reads a part of one head's coded tokens, or a part of its tail, as in
``kernels/coded.py``. Heads with the same format share a launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonalloc.attention.kernels.coded import (
    _MOST_PARTS,
    _columns,
    _factor,
    _kind,
    _padded,
    _run_logits,
    readable,
)
from reasonalloc.attention.kernels.coded import _vectors as _decoded
from reasonalloc.attention.kernels.decode import (
    _block,
    _capped,
    _on,
    _share,
    _splits,
    _store_part,
    _weigh,
)
from reasonalloc.attention.kernels.paged.decode import (
    _attended,
    _buffers,
    _join_kernel,
    _queries,
    _tile,
)
from reasonalloc.attention.kernels.paged.pages import (
    _FLOATS,
    _VARYING,
    Pool,
    RunTables,
    _addresses,
    _demand,
    _entry,
    _int32,
    _page_starts,
    _runs,
)
from reasonalloc.ops.codes import rotated
from reasonalloc.ops.page_rows import PageRows

# What a kernel knows of a format, in the order in which the operator takes it.
_FORMAT = ("WIDTH", "PER_PAGE", "KEY", "VALUE", "VALUE_AT", "KEY_NUMBERS_AT", "VALUE_NUMBERS_AT")


@triton.jit(do_not_specialize=[*_VARYING, "splits", "tail_splits"])
def _coded_kernel(
    query, turned, pool, codes, halves, table, seq_lens, slots, first, shift, plain, coded, begin,
    heads, parts, peaks, sums,
    layer, table_slots, max_blocks, table_stride, query_row, query_head, turned_row, turned_head,
    block_stride, layer_stride, head_stride, token_stride, value_at, scaling, softcap,
    splits, tail_splits,
    WIDTH: tl.constexpr, PER_PAGE: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    VALUE_AT: tl.constexpr, KEY_NUMBERS_AT: tl.constexpr, VALUE_NUMBERS_AT: tl.constexpr,
    HEADS: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr, TAIL_BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0), tl.program_id(2)
    seen = tl.load(seq_lens + row)
    if seen <= 0:
        return
    head = tl.load(heads + tl.program_id(1))
    start, moved, own = _entry(
        first, shift, plain, slots, row, head, layer, table_slots, HEADS
    )  # fmt: skip
    entry = (layer * table_slots + tl.load(slots + row)).to(tl.int64) * HEADS + head
    table += row.to(tl.int64) * table_stride
    real = tl.arange(0, GROUP_PAD) < GROUP
    place = row.to(tl.int64) * HEADS * GROUP + head * GROUP + tl.arange(0, GROUP_PAD)
    place = place * (splits + tail_splits) + split
    peak = tl.full([GROUP_PAD], -1e30, tl.float32)  # finite: a part may be empty
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, DIM_PAD], tl.float32)
    if split < splits:
        dtype: tl.constexpr = pool.dtype.element_ty
        size: tl.constexpr = dtype.primitive_bitwidth // 8
        column = _columns(KEY, DIM, DIM_PAD)
        q = _queries(turned, row, head, column, turned_row, turned_head, GROUP, GROUP_PAD, DIM)
        q = q.to(tl.float32)
        low, high = _share(tl.load(coded + entry), split, splits, BLOCK)
        for at in range(low, high, BLOCK):
            token = at + tl.arange(0, BLOCK)
            inside = token < high
            page = _page_starts(
                token // PER_PAGE, inside, start, own, table, max_blocks, layer, head,
                block_stride, layer_stride, head_stride, HEADS, PER_BLOCK,
            )  # fmt: skip
            rows = page * size + (token % PER_PAGE) * WIDTH
            s = _run_logits(
                q, codes, halves, rows, inside, scaling, softcap, KEY_NUMBERS_AT, KEY, dtype,
                DIM, DIM_PAD, BLOCK, SOFTCAP, PRECISION,
            )  # fmt: skip
            p, shrink, peak, total = _weigh(s, peak, total, inside)
            p *= _factor(halves, rows, inside, VALUE_NUMBERS_AT, VALUE, BLOCK)[None, :]
            v = _decoded(
                codes, halves, rows, inside, VALUE_AT, VALUE_NUMBERS_AT, VALUE, dtype,
                DIM, DIM_PAD, BLOCK,
            )  # fmt: skip
            acc = acc * shrink[:, None] + tl.dot(p, v, input_precision=PRECISION)
        column = _columns(VALUE, DIM, DIM_PAD)
        _store_part(parts, peaks, sums, place, acc, peak, total, column, real, DIM)
    else:
        dim = tl.arange(0, DIM_PAD)
        asked = _queries(query, row, head, dim, query_row, query_head, GROUP, GROUP_PAD, DIM)
        tail = tl.load(begin + entry)
        low, high = _share(moved + seen - tail, split - splits, tail_splits, TAIL_BLOCK)
        for at in range(tail + low, tail + high, TAIL_BLOCK):
            token = at + tl.arange(0, TAIL_BLOCK)
            inside = token < tail + high
            where = _addresses(
                token, inside, start, own, table, max_blocks, layer, head,
                block_stride, layer_stride, head_stride, token_stride, HEADS, PER_BLOCK, BLOCK_SIZE,
            )  # fmt: skip
            k = _tile(pool, where, inside, dim, DIM, 0, asked.dtype)
            s = tl.dot(asked, tl.trans(k), input_precision="ieee") * scaling
            p, shrink, peak, total = _weigh(_capped(s, softcap, SOFTCAP), peak, total, inside)
            v = _tile(pool, where + value_at, inside, dim, DIM, 0, asked.dtype)
            acc = acc * shrink[:, None] + tl.dot(p.to(asked.dtype), v, input_precision="ieee")
        _store_part(parts, peaks, sums, place, acc, peak, total, dim, real, DIM)


@dataclass(frozen=True)
class CodedTables:
    """Where coded tokens of runs end, beside ``RunTables``.

    Attributes:
        coded: [layers, slots, heads] int32, coded tokens of the run, the first of it.
        begin: [layers, slots, heads] int32, the place of the first plain one: pages of ``coded``
            tokens, times ``block_size``.

    Raises:
        RuntimeError: they are something else.
    """

    coded: Tensor
    begin: Tensor

    def __post_init__(self) -> None:
        three = (*self.coded.shape, 0, 0, 0)[:3]
        _int32("coded", self.coded, three, self.coded.device)
        _int32("begin", self.begin, three, self.coded.device)


def coded_splits(
    rows: int, coded_most: int, tail_most: int, query: Tensor, pool: Pool
) -> tuple[int, int]:
    """How many parts ``paged_decode_coded`` cuts coded tokens and a tail into: powers of two.

    Args:
        rows: of the query.
        coded_most, tail_most: bounds of the coded tokens of a run and of the plain ones; a run of
            a request that is not compressed is all tail.
        query: any tensor of its type and device.
        pool: the pages.
    """
    runs, dim = max(1, rows * pool.heads), pool.head_dim
    blocks = (_block(dim, 4), _block(dim, query.element_size()))
    splits, tail_splits = (
        min(_splits(query.device, runs, max(1, most), block), _MOST_PARTS // 2)
        for most, block in zip((coded_most, tail_most), blocks, strict=True)
    )
    return splits, tail_splits


def paged_decode_coded(
    query: Tensor,
    pool: Pool,
    tables: RunTables,
    coded: CodedTables,
    rows: Sequence[PageRows],
    layer: int,
    block_table: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    out: Tensor,
    lse: Tensor,
    scratch: Tensor,
    splits: int,
    tail_splits: int,
    scaling: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """``paged_decode`` over runs whose first tokens may be coded.

    A launch for every format, and one, whose grids follow from ``query``'s shape and the numbers of
    parts. The first call with a format copies numbers of heads to the device, which no CUDA graph
    can capture; later ones copy nothing.

    Args:
        query: [rows, query_heads, head_dim], the heads of a group beside each other; float32,
            float16 or bfloat16; any strides but the last: 1. Products with coded tokens are formed
            in tf32 unless it is float32, those with plain ones in its type.
        pool, tables, coded: where the runs are; pages of float32, float16 or bfloat16, each in one
            piece.
        rows: of each KV head of the layer, how its coded tokens lie in a page.
        layer: whose.
        block_table: [rows, n] int32, the blocks of each row's request.
        seq_lens: [rows] int32, tokens of each sequence, the new one included; 0: padding, nothing
            of the row is read, and its ``out`` and ``lse`` stay as they are.
        slots: [rows] int32, rows of the tables.
        out: as query; is written.
        lse: [rows, query_heads] float32, is written; see ``paged_decode``.
        scratch: [at least ``scratch_floats(..)``, of all parts] float32, contiguous; is
            overwritten.
        splits, tail_splits: parts of the coded tokens and of the tail, each at least 1, at most 64
            together; see ``coded_splits``.
        scaling, softcap: of the logits; softcap 0 for none.
        sinks: [query_heads] float32, logits that stand in the softmax without a value.

    Raises:
        RuntimeError: something has another shape, type or place.
    """
    _runs(pool, tables, layer, block_table, slots, query)
    _demand(
        coded.coded.shape == tables.first.shape and coded.coded.device == query.device,
        f"coded {list(coded.coded.shape)} on {coded.coded.device} beside tables "
        f"{list(tables.first.shape)} on {query.device}",
    )
    _demand(
        min(splits, tail_splits) >= 1,
        f"{splits} splits of coded tokens and {tail_splits} of tails: at least 1 of each",
    )
    _attended(query, pool, seq_lens, slots, out, lse, scratch, splits + tail_splits, sinks)
    size, dim = pool.block_size, pool.head_dim
    _demand(
        pool.data.dtype in _FLOATS
        and (pool.token_stride, pool.value_at) in ((2 * dim, dim), (dim, size * dim)),
        f"coded tokens in a pool of {pool.data.dtype} whose tokens lie {pool.token_stride} and "
        f"values {pool.value_at} apart: its pages must be floats in one piece of {2 * size * dim}",
    )
    _demand(len(rows) == pool.heads, f"{len(rows)} formats of {pool.heads} KV heads")
    formats, which = _formats(tuple(rows), size, dim, pool.data.dtype)
    _decode_coded(
        query, pool.data, tables.first, tables.shift, tables.plain, coded.coded, coded.begin,
        block_table, seq_lens, slots, sinks, out, lse, scratch, formats, which, pool.strides,
        size, layer, splits, tail_splits, scaling, softcap,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _formats(
    rows: tuple[PageRows, ...], block_size: int, dim: int, dtype: torch.dtype
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``_FORMAT`` and whether keys are rotated, of each format; and the format of each head."""
    numbers: list[int] = []
    distinct = list(dict.fromkeys(rows))
    page_bytes = 2 * block_size * dim * dtype.itemsize
    for one in distinct:
        form, fields = one.form, (one.form.key, one.form.value)
        _demand(
            one.page_bytes == page_bytes and one.per_page > 0,
            f"rows of {one.width} bytes in pages of {one.page_bytes}: pages have {page_bytes}",
        )
        _demand(
            all((field.dim, field.dtype) == (dim, dtype) for field in fields) and readable((form,)),
            f"rows of {form} in pages of {dim} numbers of {dtype}: no kernel reads them",
        )
        numbers += [one.width, one.per_page, _kind(form.key.kind), _kind(form.value.kind)]
        numbers += [form.value_at, form.key_numbers_at, form.value_numbers_at]
        numbers.append(int(form.key.kind == "int4h"))
    return tuple(numbers), tuple(distinct.index(one) for one in rows)


def prepare_coded(rows: Sequence[PageRows], pool: Pool) -> None:
    """Copy to the device what ``paged_decode_coded`` keeps of a layer's formats.

    After it a CUDA graph can capture the first call.

    Args:
        rows, pool: see ``paged_decode_coded``.
    """
    dim, device = pool.head_dim, pool.data.device
    formats, which = _formats(tuple(rows), pool.block_size, dim, pool.data.dtype)
    for _, rotates, _ in _launches(formats, which, device):
        if rotates:
            rotated(torch.zeros(1, dim, dtype=torch.float32, device=device))


@torch.library.custom_op("reasonalloc::paged_decode_coded", mutates_args=("out", "lse", "scratch"))
def _decode_coded(
    query: Tensor,
    pool: Tensor,
    first: Tensor,
    shift: Tensor,
    plain: Tensor,
    coded: Tensor,
    begin: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    slots: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scratch: Tensor,
    formats: Sequence[int],
    which: Sequence[int],
    strides: Sequence[int],
    block_size: int,
    layer: int,
    splits: int,
    tail_splits: int,
    scaling: float,
    softcap: float,
) -> None:
    """What ``paged_decode_coded`` has checked; not to be called without."""
    rows, query_heads, dim = query.shape
    layers, table_slots, heads = first.shape
    if rows == 0:
        return
    every, group = splits + tail_splits, query_heads // heads
    buffers = _buffers(scratch, rows * query_heads * every, dim)
    launches = _launches(tuple(formats), tuple(which), query.device)
    turned = rotated(query.float()) if any(turns for _, turns, _ in launches) else query
    flat = pool.as_strided((1,), (1,))  # kernels compute every address themselves
    exact = query.dtype == torch.float32
    sizes = {"HEADS": heads, "GROUP": group, "DIM": dim, "DIM_PAD": _padded(dim)}
    tail_block = _block(dim, query.element_size())
    with _on(query.device):
        for form, turns, own in launches:
            asked = turned if turns else query
            _coded_kernel[(rows, len(own), every)](
                query, asked, pool, flat.view(torch.uint8), flat.view(torch.int16), block_table,
                seq_lens, slots, first, shift, plain, coded, begin, own, *buffers,
                layer, table_slots, block_table.shape[1], block_table.stride(0),
                query.stride(0), query.stride(1), asked.stride(0), asked.stride(1), *strides,
                scaling, softcap or 1.0, splits, tail_splits,
                PER_BLOCK=layers * heads, BLOCK_SIZE=block_size,
                GROUP_PAD=max(16, triton.next_power_of_2(group)),  # the least that tl.dot takes
                BLOCK=_block(dim, 4), TAIL_BLOCK=tail_block, SOFTCAP=softcap != 0,
                PRECISION="ieee" if exact else "tf32", **form, **_launch(query.dtype), **sizes,
            )  # fmt: skip
        _join_kernel[(rows, query_heads)](
            *buffers, lse if sinks is None else sinks, seq_lens, slots, shift, out, lse,
            layer, table_slots, every, out.stride(0), out.stride(1), 1.0,
            SPLITS_PAD=triton.next_power_of_2(every), BLOCK=tail_block, SINKS=sinks is not None,
            ALL=True, num_warps=1 if every <= 8 else 4, **sizes,
        )  # fmt: skip


@_decode_coded.register_fake
def _(*arguments: object) -> None:
    """Nothing is returned, and nothing is read."""


@lru_cache(maxsize=256)
def _launches(
    formats: tuple[int, ...], which: tuple[int, ...], device: torch.device
) -> tuple[tuple[dict[str, int], bool, Tensor], ...]:
    """Each format, whether its keys are rotated, and its heads, [heads of it] int32."""
    size = len(_FORMAT) + 1
    with torch.inference_mode(False):
        return tuple(
            (
                dict(zip(_FORMAT, formats[size * number :], strict=False)),
                bool(formats[size * number + size - 1]),
                torch.tensor(
                    [head for head, own in enumerate(which) if own == number],
                    dtype=torch.int32,
                    device=device,
                ),
            )
            for number in range(len(formats) // size)
        )


def _launch(dtype: torch.dtype) -> dict[str, int]:
    """Warps and stages: two, since decoded tiles are wide."""
    return {"num_warps": 8 if dtype == torch.float32 else 4, "num_stages": 2}
