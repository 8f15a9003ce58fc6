"""``program.cpp``: a decode step as a list of instructions, run by a team of threads in one go.

Instructions are drafted on the tensors of a step that was noted. Those that instructions alone make
and read are given places in one arena, which is used again as soon as nobody reads them any more;
and a barrier is put before every instruction that meets what other threads may still be at.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reasonalloc.cpu_step import build
from reasonalloc.cpu_step.check import check_draft
from reasonalloc.cpu_step.draft import Draft, storage_of
from reasonalloc.cpu_step.structs import KINDS, Instruction, Share
from reasonalloc.ops.native.check import failure

_ALIGNMENT = 64


class Arena:
    """Memory for what a program makes and reads itself.

    Args:
        drafts: all instructions of a step, in their order.
        inner: storages that may be moved into the arena.
    """

    def __init__(self, drafts: Sequence[Draft], inner: set[int]) -> None:
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        sizes: dict[int, int] = {}
        for i, draft in enumerate(drafts):
            for tensor in (t for group in draft.tensors() for t in group):
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key in inner:
                    first.setdefault(key, i)
                    last[key] = i
                    sizes[key] = -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        self._offsets = _places(first, last, sizes)
        total = max((self._offsets[key] + sizes[key] for key in sizes), default=0)
        self._memory = torch.empty(total + _ALIGNMENT, dtype=torch.uint8, device="cpu")
        self._start = -self._memory.data_ptr() % _ALIGNMENT

    def address(self, tensor: Tensor) -> int:
        """Where its first element lies."""
        offset = self._offsets.get(storage_of(tensor))
        if offset is None:
            return tensor.data_ptr()
        own = int(tensor.storage_offset()) * tensor.element_size()
        return self._memory.data_ptr() + self._start + offset + own

    def holds(self, tensor: Tensor) -> bool:
        """Whether it lies in the arena."""
        return storage_of(tensor) in self._offsets

    def placed(self, tensor: Tensor) -> Tensor:
        """The same tensor where it lies."""
        offset = self._offsets.get(storage_of(tensor))
        if offset is None:
            return tensor
        typed = self._memory[self._start + offset :]
        typed = typed[: len(typed) // 8 * 8].view(tensor.dtype)
        return typed.as_strided(
            tensor.shape, tensor.stride(), typed.storage_offset() + tensor.storage_offset()
        )


def _places(first: dict[int, int], last: dict[int, int], sizes: dict[int, int]) -> dict[int, int]:
    """An offset for each storage: the lowest that is free while it is in use."""
    offsets: dict[int, int] = {}
    used: list[tuple[int, int, int]] = []  # begin, end, last use; in the order of begins
    for key in sorted(first, key=lambda key: first[key]):
        used = [place for place in used if place[2] >= first[key]]
        offset, at = 0, len(used)
        for i, (begin, end, _) in enumerate(used):
            if offset + sizes[key] <= begin:
                at = i
                break
            offset = max(offset, end)
        offsets[key] = offset
        used.insert(at, (offset, offset + sizes[key], last[key]))
    return offsets


@dataclass(frozen=True)
class _Access:
    """Bytes [begin, end) that an instruction touches, and who does."""

    begin: int
    end: int
    share: Share
    rows: tuple[int, int, int, int] = (0, 0, 0, 0)  # their number, bytes between them, the first

    def meets(self, other: _Access) -> bool:
        """Whether another thread may touch the same bytes."""
        if self.end <= other.begin or other.end <= self.begin:
            return False
        if self.share is Share.NONE and other.share is Share.NONE:
            return False  # one thread
        if self.share is Share.ROWS and other.share is Share.ROWS:
            count, step, begin, end = self.rows
            if step > 0 and (count, step) == other.rows[:2]:
                # Parts of the same rows, which one thread has in both.
                return max(end, other.rows[3]) - min(begin, other.rows[2]) > step
        return True


@dataclass
class _Window:
    """What was touched since the last barrier."""

    reads: list[_Access] = field(default_factory=list)
    writes: list[_Access] = field(default_factory=list)

    def needs_barrier(self, reads: list[_Access], writes: list[_Access]) -> bool:
        """Take note of an instruction; whether it must wait for those before."""
        waits = any(x.meets(y) for x in reads + writes for y in self.writes) or any(
            x.meets(y) for x in writes for y in self.reads
        )
        if waits:
            self.reads, self.writes = [], []
        self.reads += reads
        self.writes += writes
        return waits


class Program:
    """Instructions that can be run again and again on the same memory.

    Args:
        drafts: in their order.
        arena: gives the places of their tensors; those that it does not have stay where they are,
            and are kept.

    Raises:
        RuntimeError: an instruction would leave its tensors.
    """

    def __init__(self, drafts: Sequence[Draft], arena: Arena) -> None:
        self._kept: list[Any] = [arena]
        self._instructions = (Instruction * len(drafts))()
        self._threads = torch.get_num_threads()
        window = _Window()
        for instruction, draft in zip(self._instructions, drafts, strict=True):
            self._fill(instruction, draft, arena)
            reads, writes = draft.tensors()
            instruction.barrier = window.needs_barrier(
                [_access(draft, tensor, arena) for tensor in reads],
                [_access(draft, tensor, arena) for tensor in writes],
            )

    def _fill(self, instruction: Instruction, draft: Draft, arena: Arena) -> None:
        check_draft(draft)
        instruction.operation, instruction.share = draft.operation, draft.share
        instruction.sizes[:] = draft.sizes
        instruction.number, instruction.factor = draft.number, draft.factor
        for name in ("out", "a", "b", "c"):
            given = getattr(draft, name)
            if given is not None:
                operand = getattr(instruction, name)
                operand.at, operand.kind = arena.address(given[0]), KINDS[given[0].dtype]
                operand.strides[:] = given[1]
        if draft.attend is not None:
            arguments = draft.attend(arena.placed)
            instruction.a.at = ctypes.addressof(arguments)
            self._kept.append(arguments)
        self._kept += [t for group in draft.tensors() for t in group if not arena.holds(t)]

    def run(self) -> None:
        """Run all instructions once, on the memory that they were made for.

        Raises:
            MemoryError, IndexError, RuntimeError: see ``check.failure``.
        """
        code = build.library().reasonalloc_run(
            ctypes.addressof(self._instructions), len(self._instructions), self._threads
        )
        if code:
            raise failure(code)


def _access(draft: Draft, tensor: Tensor, arena: Arena) -> _Access:
    size = tensor.element_size()
    begin = arena.address(tensor)
    spans = [(n - 1) * s * size for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    end = begin + sum(spans) + size
    if draft.share is not Share.ROWS:
        return _Access(begin, end, draft.share)
    count = draft.sizes[0]
    for operand in (draft.out, draft.a, draft.b):
        if operand is not None and operand[0] is tensor:
            step = operand[1][0] * size
            return _Access(begin, end, Share.ROWS, (count, step, begin, end - (count - 1) * step))
    return _Access(begin, end, Share.BLOCKS)


def collapsed(
    shape: Sequence[int], strides: Iterable[Sequence[int]], most: int
) -> tuple[list[int], list[list[int]]] | None:
    """The same elements with the fewest dimensions, outermost of the first tensor first.

    Args:
        shape: of all tensors.
        strides: of each of them.
        most: dimensions that there may be; sizes and strides are filled up to it in front.

    Returns:
        Sizes, and strides of each tensor; None if they are too many.
    """
    tables = [list(own) for own in strides]
    dims = [d for d, size in enumerate(shape) if size != 1]
    dims.sort(key=lambda d: -tables[0][d])
    sizes: list[int] = []
    kept: list[list[int]] = [[] for _ in tables]
    for d in dims:
        if sizes and all(k[-1] == t[d] * shape[d] for k, t in zip(kept, tables, strict=True)):
            sizes[-1] *= shape[d]
            for k, t in zip(kept, tables, strict=True):
                k[-1] = t[d]
            continue
        sizes.append(shape[d])
        for k, t in zip(kept, tables, strict=True):
            k.append(t[d])
    if len(sizes) > most:
        return None
    missing = most - len(sizes)
    return [1] * missing + sizes, [[0] * missing + own for own in kept]
