"""Decode attention over ragged runs, split along the run (flash-decoding, arXiv 2311.01282).

A program reads a part of one head's run once, for all query heads of its group; a second kernel
joins the parts. Offsets and lengths are read on the device and the grid does not depend on them, so
a step never waits for the host and can be captured in a CUDA graph.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _run(offsets, lengths, row, kv_heads, uniform_run, uniform_length, UNIFORM: tl.constexpr):
    """First slot and length of the run of (sequence, KV head) ``row``."""
    if UNIFORM:
        start = (row % kv_heads).to(tl.int64) * uniform_run
        length = uniform_length
    else:
        start = tl.load(offsets + row)
        length = tl.load(lengths + row).to(tl.int32)
    return start, length


@triton.jit
def _share(length, split, splits, BLOCK: tl.constexpr):
    """First token, and the one after the last, of a part of a run."""
    chunk = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    first = split * chunk
    return first, tl.minimum(first + chunk, length)


@triton.jit
def _capped(s, softcap, SOFTCAP: tl.constexpr):
    """Logits, soft-capped if asked for."""
    if SOFTCAP:
        s = softcap * (2 * tl.sigmoid(2 * s / softcap) - 1)
    return s


@triton.jit
def _logits(q, k, softcap, SOFTCAP: tl.constexpr):
    """[group, block] float32; queries come scaled."""
    return _capped(tl.dot(q, tl.trans(k), input_precision="ieee"), softcap, SOFTCAP)


@triton.jit
def _query(query, head, column, real, DIM: tl.constexpr):
    """[group, columns] as stored: number ``column`` of each ``real`` query; 0 from ``DIM`` on."""
    return tl.load(
        query + head[:, None] * DIM + column[None, :],
        mask=real[:, None] & (column[None, :] < DIM),
        other=0.0,
    )


@triton.jit
def _weigh(s, peak, total, inside):
    """Weights [group, block] of a block's logits below a new peak, and the factor of older ones."""
    s = tl.where(inside[None, :], s, -1e30)
    higher = tl.maximum(peak, tl.max(s, axis=1))
    shrink = tl.exp(peak - higher)
    p = tl.where(inside[None, :], tl.exp(s - higher[:, None]), 0.0)
    return p, shrink, higher, total * shrink + tl.sum(p, axis=1)


@triton.jit
def _store_part(
    parts, peaks, sums, at, acc, peak, total, column, real, VDIM: tl.constexpr
):  # fmt: skip
    """Store what a program summed.

    ``at`` [group] are places, of ``real`` query heads; ``column`` those of ``acc``.
    """
    tl.store(
        parts + at[:, None] * VDIM + column[None, :],
        acc,
        mask=real[:, None] & (column[None, :] < VDIM),
    )
    tl.store(peaks + at, peak, mask=real)
    tl.store(sums + at, total, mask=real)


@triton.jit(do_not_specialize=["uniform_length"])
def _split_kernel(
    query, keys, values, offsets, lengths, parts, peaks, sums,
    kv_heads, uniform_run, uniform_length, slots, scaling, softcap,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VDIM: tl.constexpr, VDIM_PAD: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, UNIFORM: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0), tl.program_id(1)
    start, length = _run(offsets, lengths, row, kv_heads, uniform_run, uniform_length, UNIFORM)
    first, last = _share(length, split, SPLITS, BLOCK)
    base = (row // kv_heads).to(tl.int64) * slots + start

    # A tile of the group's query heads: a group may be larger than what a program can hold.
    group = tl.program_id(2) * GROUP_PAD + tl.arange(0, GROUP_PAD)
    dim, vdim, column = tl.arange(0, DIM_PAD), tl.arange(0, VDIM_PAD), tl.arange(0, BLOCK)
    head, real = row.to(tl.int64) * GROUP + group, group < GROUP
    q = _query(query, head, dim, real, DIM)
    q = (q.to(tl.float32) * scaling).to(keys.dtype.element_ty)
    peak = tl.full([GROUP_PAD], -1e30, tl.float32)  # finite: a part may be empty
    total = tl.zeros([GROUP_PAD], tl.float32)
    acc = tl.zeros([GROUP_PAD, VDIM_PAD], tl.float32)
    for begin in range(first, last, BLOCK):
        at = begin + column
        inside = at < last
        slot = base + at
        k = tl.load(
            keys + slot[:, None] * DIM + dim[None, :],
            mask=inside[:, None] & (dim[None, :] < DIM),
            other=0.0,
        )
        s = _logits(q, k, softcap, SOFTCAP)
        p, shrink, peak, total = _weigh(s, peak, total, inside)
        v = tl.load(
            values + slot[:, None] * VDIM + vdim[None, :],
            mask=inside[:, None] & (vdim[None, :] < VDIM),
            other=0.0,
        )
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    place = head * SPLITS + split
    _store_part(parts, peaks, sums, place, acc, peak, total, vdim, real, VDIM)


@triton.jit
def _join_kernel(
    parts, peaks, sums, sinks, out, norms, query_heads,
    VDIM: tl.constexpr, VDIM_PAD: tl.constexpr, SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    split, vdim = tl.arange(0, SPLITS_PAD), tl.arange(0, VDIM_PAD)
    there = split < SPLITS
    peak = tl.load(peaks + head * SPLITS + split, mask=there, other=-1e30)
    total = tl.load(sums + head * SPLITS + split, mask=there, other=0.0)
    highest = tl.max(peak, axis=0)
    if SINKS:
        sink = tl.load(sinks + head % query_heads)
        highest = tl.maximum(highest, sink)
    weight = tl.exp(peak - highest)
    whole = tl.sum(total * weight, axis=0)
    if SINKS:
        whole += tl.exp(sink - highest)
    whole = tl.maximum(whole, 1e-30)  # of no token, the sum is 0
    part = tl.load(
        parts + (head * SPLITS + split[:, None]) * VDIM + vdim[None, :],
        mask=there[:, None] & (vdim[None, :] < VDIM),
        other=0.0,
    )
    result = tl.sum(part * weight[:, None], axis=0) / whole
    tl.store(out + head * VDIM + vdim, result.to(out.dtype.element_ty), mask=vdim < VDIM)
    tl.store(norms + head, highest + tl.log(whole))


@triton.jit(do_not_specialize=["uniform_length"])
def _received_kernel(
    query, keys, offsets, lengths, norms, received,
    kv_heads, uniform_run, uniform_length, slots, scaling, softcap,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr, UNIFORM: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    # Blocks come first: the other axes of a grid end at 65,535.
    block, row = tl.program_id(0), tl.program_id(1)
    start, length = _run(offsets, lengths, row, kv_heads, uniform_run, uniform_length, UNIFORM)
    if block * BLOCK < length:
        dim, at = tl.arange(0, DIM_PAD), block * BLOCK + tl.arange(0, BLOCK)
        inside = at < length
        slot = (row // kv_heads).to(tl.int64) * slots + start + at
        k = tl.load(
            keys + slot[:, None] * DIM + dim[None, :],
            mask=inside[:, None] & (dim[None, :] < DIM),
            other=0.0,
        )
        total = tl.zeros([BLOCK], tl.float32)
        for tile in range(0, GROUP, GROUP_PAD):
            group = tile + tl.arange(0, GROUP_PAD)
            head, real = row.to(tl.int64) * GROUP + group, group < GROUP
            q = _query(query, head, dim, real, DIM)
            q = (q.to(tl.float32) * scaling).to(keys.dtype.element_ty)
            norm = tl.load(norms + head, mask=real, other=0.0)
            p = tl.exp(_logits(q, k, softcap, SOFTCAP) - norm[:, None])
            total += tl.sum(tl.where(real[:, None], p, 0.0), axis=0)
        tl.store(received + slot, total, mask=inside)


def decode(
    query: Tensor,
    slab: Any,
    scaling: float,
    softcap: float | None,
    need_weights: bool,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Arguments and result of ``Backend.decode``."""
    with _on(query.device):
        return _decode(query, slab, scaling, softcap, need_weights, sinks)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one, on which triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _decode(
    query: Tensor,
    slab: Any,
    scaling: float,
    softcap: float | None,
    need_weights: bool,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    batch, query_heads, _, dim = query.shape
    heads, vdim = slab.kv_heads, slab.values.shape[-1]
    group, slots = query_heads // heads, slab.keys.shape[1]
    uniform = slab.uniform_length is not None
    query = query.reshape(batch, query_heads, dim).contiguous()
    run = slab.rows(slab.positions).stride(1) if uniform else 0
    # Unused pointers of the uniform case, which reads no table.
    offsets, lengths = (query, query) if uniform else (slab.offsets, slab.lengths)
    block, tile = _block(max(dim, vdim), query.element_size()), _tile(group, max(dim, vdim))
    splits = _splits(query.device, batch * heads, slots // heads, block)
    fresh: dict[str, Any] = {"device": query.device, "dtype": torch.float32}
    parts = torch.empty(batch * query_heads, splits, vdim, **fresh)
    peaks = torch.empty(batch * query_heads, splits, **fresh)
    sums = torch.empty_like(peaks)
    norms = torch.empty(batch * query_heads, **fresh)
    out = query.new_empty(batch, query_heads, 1, vdim, dtype=slab.values.dtype)
    shared: dict[str, Any] = {
        "GROUP": group,
        "GROUP_PAD": tile,
        "DIM": dim,
        "DIM_PAD": max(16, triton.next_power_of_2(dim)),
        "BLOCK": block,
        "UNIFORM": uniform,
        "SOFTCAP": softcap is not None,
    }
    numbers = (heads, run, slab.uniform_length or 0, slots, scaling, softcap or 1.0)
    padded = max(16, triton.next_power_of_2(vdim))
    _split_kernel[(batch * heads, splits, triton.cdiv(group, tile))](
        query, slab.keys, slab.values, offsets, lengths, parts, peaks, sums, *numbers,
        VDIM=vdim, VDIM_PAD=padded, SPLITS=splits, num_warps=4,
        num_stages=_stages(max(dim, vdim), query.element_size()), **shared,
    )  # fmt: skip
    join(parts, peaks, sums, sinks, out, norms)
    if not need_weights:
        return out, None
    received = torch.zeros(batch, slots, **fresh)
    # No run is longer than the slab; blocks beyond a run end at once.
    longest = run if uniform else slots
    _received_kernel[(triton.cdiv(longest, block), batch * heads)](
        query, slab.keys, offsets, lengths, norms, received, *numbers, num_warps=4, **shared,
    )  # fmt: skip
    return out, received


def join(
    parts: Tensor, peaks: Tensor, sums: Tensor, sinks: Tensor | None, out: Tensor, norms: Tensor
) -> None:
    """Put the parts of all runs together.

    Args:
        parts: [batch * query_heads, splits, value_dim] float32; peaks, sums: the same without the
            last dimension.
        sinks: [query_heads], which stand in the softmax as well, or None.
        out: [batch, query_heads, 1, value_dim], is written.
        norms: [batch * query_heads] float32, is written: the log-sum-exp of every query head's
            logits, its sink included.
    """
    rows, splits, vdim = parts.shape
    own = norms if sinks is None else sinks.float().contiguous()  # a pointer that is not read
    _join_kernel[(rows,)](
        parts, peaks, sums, own, out, norms, out.shape[1],
        VDIM=vdim, VDIM_PAD=max(16, triton.next_power_of_2(vdim)), SPLITS=splits,
        SPLITS_PAD=triton.next_power_of_2(splits), SINKS=sinks is not None,
        num_warps=1 if splits * vdim <= 16384 else 4,
    )  # fmt: skip


def _block(dim: int, itemsize: int) -> int:
    """Tokens per step of a program: keys and values of two stages must fit into shared memory."""
    return 64 if dim * itemsize <= 256 else 32 if dim * itemsize <= 1024 else 16


def _tile(group: int, dim: int) -> int:
    """Query heads of a program, padding included; at least 16, which ``tl.dot`` takes."""
    return int(min(max(16, triton.next_power_of_2(group)), 64 if dim <= 256 else 16))


def _stages(dim: int, itemsize: int) -> int:
    """Blocks in shared memory at a time."""
    return 2 if dim * itemsize <= 1280 else 1


def _power(number: int) -> int:
    """The largest power of two that is not above ``number``."""
    return 1 << (number.bit_length() - 1)


def _splits(device: torch.device, rows: int, mean_run: int, block: int) -> int:
    """Parts of a run: enough programs to fill the device, two blocks of work for each at least.

    A power of two: every number of parts is a kernel of its own, and rows and lengths change all
    the time.
    """
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 8
    )
    wanted = triton.cdiv(4 * processors, rows)
    return _power(max(1, min(wanted, triton.cdiv(mean_run, 2 * block), 64)))
