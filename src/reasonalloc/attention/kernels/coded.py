"""Decode attention over coded runs and the tails behind them, split like ``kernels/decode.py``.

A program reads a part of one head's run, whose bytes it decodes in registers, or a part of its
tail. Heads with the same format share a launch. All starts and lengths are read on the device and
no grid depends on them, so a step can be captured in a CUDA graph once it has run.

Columns of an ``int4`` tile alternate between low and high halves of bytes, as they are unpacked;
queries are loaded, and sums stored, in the same order (``_columns``).
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonalloc.attention.coded import CodedView
from reasonalloc.attention.kernels.decode import (
    _block,
    _capped,
    _on,
    _power,
    _query,
    _share,
    _splits,
    _store_part,
    _weigh,
    join,
)
from reasonalloc.ops.codes import GROUP, KINDS, RowFormat, rotated

_AUTO, _INT8, _FP8 = (tl.constexpr(KINDS[name]) for name in ("auto", "int8", "fp8"))
_INT4 = tl.constexpr(KINDS["int4"])  # and of ``int4h``, whose queries come rotated
_GROUP = tl.constexpr(GROUP)
_MOST_PARTS = 64  # of a run and its tail, which one program joins


@triton.jit
def _columns(KIND: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr):
    """[PAD]: which number of the vector each column of a tile holds; ``DIM`` where none."""
    column = tl.arange(0, PAD)
    if KIND == _INT4:
        byte = column // 2
        group = byte // (_GROUP // 2)
        half = tl.minimum(DIM - group * _GROUP, _GROUP) // 2
        number = group * _GROUP + byte % (_GROUP // 2) + (column % 2) * half
        column = tl.where(byte < DIM // 2, number, DIM)
    return column


@triton.jit
def _float16(halves, at, mask):
    """float32 of float16 numbers in the pool."""
    return tl.load(halves + at, mask=mask, other=0).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _int4(
    pool, halves, rows, inside, AT: tl.constexpr, NUMBERS_AT: tl.constexpr,
    DIM: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    byte, group = tl.arange(0, PAD // 2), tl.arange(0, PAD // _GROUP)
    packed = tl.load(
        pool + rows[:, None] + (AT + byte)[None, :],
        mask=inside[:, None] & (byte < DIM // 2)[None, :],
        other=0,
    )
    codes = tl.interleave(packed & 15, packed >> 4).to(tl.float32)
    at = ((rows + NUMBERS_AT) // 2)[:, None] + 2 * group[None, :]
    mask = inside[:, None] & (group * _GROUP < DIM)[None, :]
    scale, offset = _float16(halves, at, mask), _float16(halves, at + 1, mask)
    x = tl.reshape(codes, [BLOCK, PAD // _GROUP, _GROUP])
    return tl.reshape(offset[:, :, None] + scale[:, :, None] * x, [BLOCK, PAD])


@triton.jit
def _e4m3(codes):
    """float32 of bytes: the bits of a float16 with another bias, which is exact, also near 0."""
    wide = codes.to(tl.int16)
    bits = ((wide & 128) << 8) | ((wide & 127) << 7)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _as_they_are(halves, at, mask, DTYPE: tl.constexpr):
    """float32 of [block, PAD] numbers; ``at`` counts them in halves, from each row's start."""
    if DTYPE.is_fp32():
        low = tl.load(halves + at, mask=mask, other=0).to(tl.int32) & 65535
        high = tl.load(halves + at + 1, mask=mask, other=0).to(tl.int32) << 16
        x = (low | high).to(tl.float32, bitcast=True)
    elif DTYPE.is_bf16():
        high = tl.load(halves + at, mask=mask, other=0).to(tl.int32) << 16
        x = high.to(tl.float32, bitcast=True)
    else:
        x = _float16(halves, at, mask)
    return x


@triton.jit
def _vectors(
    pool, halves, rows, inside, AT: tl.constexpr, NUMBERS_AT: tl.constexpr, KIND: tl.constexpr,
    DTYPE: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[block, PAD] float32 of the rows that begin at bytes ``rows``; see also ``_factor``."""
    if KIND == _INT4:
        x = _int4(pool, halves, rows, inside, AT, NUMBERS_AT, DIM, PAD, BLOCK)
    else:
        column = tl.arange(0, PAD)
        mask = inside[:, None] & (column < DIM)[None, :]
        if KIND == _AUTO:
            size: tl.constexpr = DTYPE.primitive_bitwidth // 16
            at = ((rows + AT) // 2)[:, None] + (column * size)[None, :]
            x = _as_they_are(halves, at, mask, DTYPE)
        else:
            codes = tl.load(pool + rows[:, None] + (AT + column)[None, :], mask=mask, other=0)
            x = _e4m3(codes) if KIND == _FP8 else codes.to(tl.int8, bitcast=True).to(tl.float32)
    return x


@triton.jit
def _factor(
    halves, rows, inside, NUMBERS_AT: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    """[block] float32: what ``_vectors`` leaves out, one scale per token; 1 where none."""
    if KIND == _INT8 or KIND == _FP8:  # noqa: SIM109 (Triton has no `in`)
        factor = _float16(halves, (rows + NUMBERS_AT) // 2, inside)
    else:
        factor = tl.full([BLOCK], 1.0, tl.float32)
    return factor


@triton.jit
def _run_logits(
    q, pool, halves, rows, inside, scaling, softcap, NUMBERS_AT: tl.constexpr, KIND: tl.constexpr,
    DTYPE: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[group, block] float32 of coded keys, which begin a row."""
    k = _vectors(pool, halves, rows, inside, 0, NUMBERS_AT, KIND, DTYPE, DIM, PAD, BLOCK)
    factor = _factor(halves, rows, inside, NUMBERS_AT, KIND, BLOCK) * scaling
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor[None, :]
    return _capped(s, softcap, SOFTCAP)


@triton.jit
def _tail_tile(tail, slot, inside, DIM: tl.constexpr, PAD: tl.constexpr):
    """[block, PAD] float32 of a tail."""
    column = tl.arange(0, PAD)
    mask = inside[:, None] & (column < DIM)[None, :]
    x = tl.load(tail + slot[:, None] * DIM + column[None, :], mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _tail_logits(
    q, tail_keys, slot, inside, scaling, softcap, DIM: tl.constexpr, PAD: tl.constexpr,
    SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[group, block] float32 of keys of a tail."""
    k = _tail_tile(tail_keys, slot, inside, DIM, PAD)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
    return _capped(s, softcap, SOFTCAP)


@triton.jit
def _row(program, heads, count, kv_heads):
    """Sequence of a program, and its place in [batch, kv_heads]."""
    sequence = (program // count).to(tl.int64)
    return sequence, sequence * kv_heads + tl.load(heads + program % count)


@triton.jit
def _split_kernel(
    query, turned, pool, halves, starts, lengths, tail_keys, tail_values, tail_lengths, heads,
    parts, peaks, sums, count, kv_heads, pool_bytes, room, scaling, softcap,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    VALUE_AT: tl.constexpr, KEY_NUMBERS_AT: tl.constexpr, VALUE_NUMBERS_AT: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    VDIM: tl.constexpr, VDIM_PAD: tl.constexpr, SPLITS: tl.constexpr, TAIL_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    sequence, row = _row(tl.program_id(0), heads, count, kv_heads)
    head, real = row * GROUP + tl.arange(0, GROUP_PAD), tl.arange(0, GROUP_PAD) < GROUP
    place = head * (SPLITS + TAIL_SPLITS) + split
    peak = tl.full([GROUP_PAD], -1e30, tl.float32)  # finite: a part may be empty
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, VDIM_PAD], tl.float32)
    key_type: tl.constexpr = tail_keys.dtype.element_ty
    value_type: tl.constexpr = tail_values.dtype.element_ty
    if split < SPLITS:
        q = _query(turned, head, _columns(KEY, DIM, DIM_PAD), real, DIM)
        q = q.to(tl.float32)
        base = tl.multiple_of(sequence * pool_bytes + tl.load(starts + row), ALIGN)
        first, last = _share(tl.load(lengths + row).to(tl.int32), split, SPLITS, BLOCK)
        for begin in range(first, last, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            inside, rows = at < last, base + at.to(tl.int64) * WIDTH
            s = _run_logits(
                q, pool, halves, rows, inside, scaling, softcap, KEY_NUMBERS_AT, KEY, key_type,
                DIM, DIM_PAD, BLOCK, SOFTCAP, PRECISION,
            )  # fmt: skip
            p, shrink, peak, total = _weigh(s, peak, total, inside)
            p *= _factor(halves, rows, inside, VALUE_NUMBERS_AT, VALUE, BLOCK)[None, :]
            v = _vectors(
                pool, halves, rows, inside, VALUE_AT, VALUE_NUMBERS_AT, VALUE, value_type,
                VDIM, VDIM_PAD, BLOCK,
            )  # fmt: skip
            acc = acc * shrink[:, None] + tl.dot(p, v, input_precision=PRECISION)
        column = _columns(VALUE, VDIM, VDIM_PAD)
        _store_part(parts, peaks, sums, place, acc, peak, total, column, real, VDIM)
    else:
        q = _query(query, head, tl.arange(0, DIM_PAD), real, DIM).to(tl.float32)
        held = tl.load(tail_lengths + row).to(tl.int32)
        first, last = _share(held, split - SPLITS, TAIL_SPLITS, BLOCK)
        for begin in range(first, last, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            inside, slot = at < last, row * room + at
            s = _tail_logits(
                q, tail_keys, slot, inside, scaling, softcap, DIM, DIM_PAD, SOFTCAP, PRECISION
            )
            p, shrink, peak, total = _weigh(s, peak, total, inside)
            v = _tail_tile(tail_values, slot, inside, VDIM, VDIM_PAD)
            acc = acc * shrink[:, None] + tl.dot(p, v, input_precision=PRECISION)
        column = tl.arange(0, VDIM_PAD)
        _store_part(parts, peaks, sums, place, acc, peak, total, column, real, VDIM)


@triton.jit
def _store_received(received, slot, s, norms, head, inside, real):
    p = tl.exp(s - tl.load(norms + head, mask=real, other=0.0)[:, None])
    tl.store(received + slot, tl.sum(tl.where(real[:, None], p, 0.0), axis=0), mask=inside)


@triton.jit
def _received_kernel(
    query, turned, pool, halves, starts, offsets, lengths, tail_keys, tail_lengths, heads,
    norms, received, count, kv_heads, pool_bytes, coded_slots, room, scaling, softcap, run_blocks,
    WIDTH: tl.constexpr, ALIGN: tl.constexpr, KEY: tl.constexpr, KEY_NUMBERS_AT: tl.constexpr,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Blocks come first: the other axes of a grid end at 65,535.
    block = tl.program_id(0)
    sequence, row = _row(tl.program_id(1), heads, count, kv_heads)
    head, real = row * GROUP + tl.arange(0, GROUP_PAD), tl.arange(0, GROUP_PAD) < GROUP
    # Slots of this sequence are those of its runs, then those of its tails.
    first_slot = sequence * (coded_slots + kv_heads * room)
    if block < run_blocks:
        length = tl.load(lengths + row).to(tl.int32)
        if block * BLOCK < length:
            at = block * BLOCK + tl.arange(0, BLOCK)
            inside = at < length
            base = tl.multiple_of(sequence * pool_bytes + tl.load(starts + row), ALIGN)
            q = _query(turned, head, _columns(KEY, DIM, DIM_PAD), real, DIM)
            s = _run_logits(
                q.to(tl.float32), pool, halves, base + at.to(tl.int64) * WIDTH, inside, scaling,
                softcap, KEY_NUMBERS_AT, KEY, tail_keys.dtype.element_ty, DIM, DIM_PAD, BLOCK,
                SOFTCAP, PRECISION,
            )  # fmt: skip
            slot = first_slot + tl.load(offsets + row) + at
            _store_received(received, slot, s, norms, head, inside, real)
    else:
        length = tl.load(tail_lengths + row).to(tl.int32)
        begin = (block - run_blocks) * BLOCK
        if begin < length:
            at = begin + tl.arange(0, BLOCK)
            inside = at < length
            q = _query(query, head, tl.arange(0, DIM_PAD), real, DIM)
            s = _tail_logits(
                q.to(tl.float32), tail_keys, row * room + at, inside, scaling, softcap,
                DIM, DIM_PAD, SOFTCAP, PRECISION,
            )  # fmt: skip
            slot = first_slot + coded_slots + (row - sequence * kv_heads) * room + at
            _store_received(received, slot, s, norms, head, inside, real)


def readable(formats: tuple[RowFormat, ...]) -> bool:
    """Whether the kernels can read rows: vectors that are not coded lie at even bytes."""
    return all(f.value.kind != "auto" or f.value_at % 2 == 0 for f in formats)


def decode_coded(
    query: Tensor,
    slab: CodedView,
    scaling: float,
    softcap: float | None,
    need_weights: bool,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and result of ``Backend.decode_coded``; of formats that are ``readable``."""
    with _on(query.device):
        return _decode_coded(query, slab, scaling, softcap, need_weights, sinks)


def _decode_coded(
    query: Tensor,
    slab: CodedView,
    scaling: float,
    softcap: float | None,
    need_weights: bool,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    batch, query_heads, _, dim = query.shape
    vdim, rows = slab.tail_values.shape[-1], batch * query_heads
    query = query.reshape(batch, query_heads, dim).contiguous()
    launches = _launches(slab.formats, query.device)
    rotates = any(form.key.kind == "int4h" for form, _ in launches)
    queries = (query, rotated(query.float()) if rotates else query)
    constants = _constants(query, slab, softcap)
    splits, tail_splits = _parts(slab, query.device, constants["BLOCK"])
    fresh: dict[str, Any] = {"device": query.device, "dtype": torch.float32}
    parts = torch.empty(rows, splits + tail_splits, vdim, **fresh)
    peaks = torch.empty(rows, splits + tail_splits, **fresh)
    sums, norms = torch.empty_like(peaks), torch.empty(rows, **fresh)
    buffers, numbers = (parts, peaks, sums), (scaling, softcap or 1.0)
    for form, heads in launches:
        _split(form, heads, queries, slab, buffers, numbers, (splits, tail_splits), constants)
    out = query.new_empty(batch, query_heads, 1, vdim, dtype=slab.tail_values.dtype)
    join(parts, peaks, sums, sinks, out, norms)
    if not need_weights:
        return out, None
    received = torch.zeros(slab.positions.shape, **fresh)
    for form, heads in launches:
        _receive(form, heads, queries, slab, (norms, received), numbers, constants)
    return out, received


def _split(
    form: RowFormat, heads: Tensor, queries: tuple[Tensor, Tensor], slab: CodedView,
    buffers: tuple[Tensor, ...], numbers: tuple[float, float], splits: tuple[int, int],
    constants: dict[str, Any],
) -> None:  # fmt: skip
    """Attend with the query heads of ``heads``, whose runs have one format."""
    vdim = slab.tail_values.shape[-1]
    _split_kernel[(len(slab.pool) * len(heads), sum(splits))](
        *_runs(form, queries, slab), slab.lengths.contiguous(), slab.tail_keys, slab.tail_values,
        slab.tail_lengths.contiguous(), heads, *buffers, *_sizes(heads, slab),
        slab.tail_keys.shape[2], *numbers, **_places(form, slab), VALUE=_kind(form.value.kind),
        VALUE_AT=form.value_at, VALUE_NUMBERS_AT=form.value_numbers_at, VDIM=vdim,
        VDIM_PAD=_padded(vdim), SPLITS=splits[0], TAIL_SPLITS=splits[1], num_warps=4,
        num_stages=2, **constants,
    )  # fmt: skip


def _receive(
    form: RowFormat, heads: Tensor, queries: tuple[Tensor, Tensor], slab: CodedView,
    buffers: tuple[Tensor, ...], numbers: tuple[float, float], constants: dict[str, Any],
) -> None:  # fmt: skip
    """Store what the tokens of ``heads`` received, given the norms of the softmax."""
    # No run is longer than all runs; blocks beyond a run end at once.
    room, block = slab.tail_keys.shape[2], constants["BLOCK"]
    run_blocks = triton.cdiv(slab.coded_slots, block)
    grid = (run_blocks + triton.cdiv(room, block), len(slab.pool) * len(heads))
    _received_kernel[grid](
        *_runs(form, queries, slab), slab.offsets.contiguous(), slab.lengths.contiguous(),
        slab.tail_keys, slab.tail_lengths.contiguous(), heads, *buffers, *_sizes(heads, slab),
        slab.coded_slots, room, *numbers, run_blocks, **_places(form, slab), num_warps=4,
        **constants,
    )  # fmt: skip


def _runs(
    form: RowFormat, queries: tuple[Tensor, Tensor], slab: CodedView
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries of tails and of runs; the pool by bytes and in pairs of them; where runs start."""
    turned = queries[form.key.kind == "int4h"]
    return queries[0], turned, slab.pool, slab.pool.view(torch.int16), slab.starts.contiguous()


def _sizes(heads: Tensor, slab: CodedView) -> tuple[int, int, int]:
    return len(heads), slab.kv_heads, slab.pool.shape[1]


def _parts(slab: CodedView, device: torch.device, block: int) -> tuple[int, int]:
    """Parts of a run, and of a tail."""
    rows, room = slab.tail_lengths.numel(), slab.tail_keys.shape[2]
    tail = min(_splits(device, rows, room, block), _MOST_PARTS // 2)
    run = _splits(device, rows, slab.coded_slots // slab.kv_heads, block)
    return _power(min(run, _MOST_PARTS - tail)), tail


def _constants(query: Tensor, slab: CodedView, softcap: float | None) -> dict[str, Any]:
    group, dim = query.shape[1] // slab.kv_heads, query.shape[-1]
    exact = slab.tail_keys.dtype == torch.float32
    return {
        "GROUP": group,
        "GROUP_PAD": max(16, triton.next_power_of_2(group)),  # the least that tl.dot takes
        "DIM": dim,
        "DIM_PAD": _padded(dim),
        "BLOCK": _block(max(dim, slab.tail_values.shape[-1]), 4),
        "SOFTCAP": softcap is not None,
        # Codes and numbers of 16 bits lose nothing there; weights and decoded int4 are rounded to
        # no less than float16 would be.
        "PRECISION": "ieee" if exact else "tf32",
    }


def _padded(dim: int) -> int:
    """Columns of a tile: whole groups of ``int4``."""
    return int(max(GROUP, triton.next_power_of_2(dim)))


def _kind(name: str) -> int:
    return KINDS["int4" if name == "int4h" else name]


def _places(form: RowFormat, slab: CodedView) -> dict[str, int]:
    """Where a row's keys lie, and what divides the place of every row."""
    one = len(set(slab.formats)) == 1  # then rows lie at multiples of their width
    return {
        "WIDTH": form.width,
        "ALIGN": gcd(form.width, slab.pool.shape[1], 16) if one else 2,
        "KEY": _kind(form.key.kind),
        "KEY_NUMBERS_AT": form.key_numbers_at,
    }


@lru_cache(maxsize=256)
def _launches(
    formats: tuple[RowFormat, ...], device: torch.device
) -> tuple[tuple[RowFormat, Tensor], ...]:
    """Each format with its heads, [heads of it] int32."""
    heads = {form: [h for h, f in enumerate(formats) if f == form] for form in formats}
    with torch.inference_mode(False):
        return tuple(
            (form, torch.tensor(own, dtype=torch.int32, device=device))
            for form, own in heads.items()
        )
