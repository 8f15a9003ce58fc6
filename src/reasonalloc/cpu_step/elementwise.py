"""``elementwise.cpp``: instructions for operations that go element by element."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reasonalloc.cpu_step import build
from reasonalloc.cpu_step.draft import Draft, storage_of
from reasonalloc.cpu_step.program import collapsed
from reasonalloc.cpu_step.structs import KINDS, Operation, Share
from reasonalloc.ops.native.structs import FLOATS

_ROWS_FROM = 2048  # elements from which threads divide an operation by sequences
_BLOCKS_FROM = 65536  # and by blocks


def elementwise(
    operation: Operation,
    out: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    number: float = 0.0,
    factor: float = 1.0,
) -> list[Draft] | None:
    """``out = operation(a, b)`` with broadcasting; all have kinds that the loops know."""
    tensors = [out, a] if b is None else [out, a, b]
    if out.dtype not in FLOATS or not all(known(t.dtype) for t in tensors):
        return None
    integers = [t for t in tensors[1:] if t.dim() > 0 and t.dtype not in FLOATS]
    if b is not None and integers and out.dtype is not torch.float32:
        return None  # PyTorch rounds them to 16 bits first
    if out.numel() == 0 or not all(_apart_or_same(out, t) for t in tensors[1:]):
        return None
    loops = loops_of(out.shape, [t.expand(out.shape).stride() for t in tensors], 4, out.numel())
    if loops is None:
        return None
    sizes, strides, share = loops
    operands = list(zip(tensors, strides, strict=True))
    draft = Draft(operation, sizes, operands[0], operands[1], number=number, factor=factor)
    draft.share = share
    if b is not None:
        draft.b = operands[2]
    return [draft]


def loops_of(
    shape: Sequence[int], strides: Sequence[Sequence[int]], most: int, elements: int
) -> tuple[Any, list[Any], Share] | None:
    """Sizes of ``most`` loops, each tensor's strides, and how threads divide them."""
    if len(shape) > 1 and shape[0] > 1 and elements >= _ROWS_FROM:
        layout = collapsed(shape[1:], [s[1:] for s in strides], most - 1)
        if layout is not None:
            sizes, steps = layout
            first = [(s[0], *t) for s, t in zip(strides, steps, strict=True)]
            return (shape[0], *sizes), first, Share.ROWS
    layout = collapsed(shape, strides, most)
    if layout is None:
        return None
    sizes, steps = layout
    share = Share.BLOCKS if elements >= _BLOCKS_FROM else Share.NONE
    return tuple(sizes), [tuple(t) for t in steps], share


def known(dtype: torch.dtype) -> bool:
    """Whether the loops, as this compiler made them, know a type."""
    kind = KINDS.get(dtype, -1)
    return kind > 2 or (kind >= 0 and bool(build.library().reasonalloc_knows(kind)))


def _apart_or_same(out: Tensor, other: Tensor) -> bool:
    """Whether an operation may write ``out`` block by block while it reads ``other``."""
    if storage_of(out) != storage_of(other):
        return True
    same = (out.shape, out.stride(), out.storage_offset()) == (
        other.shape,
        other.stride(),
        other.storage_offset(),
    )
    return same and out.dtype == other.dtype


def as_float_rows(x: Tensor, drafts: list[Draft]) -> Tensor:
    """The rows as contiguous floats, by a copy if they are not."""
    if x.dtype is torch.float32 and (x.stride(1) == 1 or x.shape[1] == 1):
        return x
    copy = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    for draft in elementwise(Operation.COPY, copy, x) or []:
        draft.temporary.add(storage_of(copy))
        drafts.append(draft)
    return copy
