"""Instructions whose tensors have no place yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from reasonalloc.cpu_step.structs import Operation, Share
from reasonalloc.ops.native.structs import Attend

Strides = tuple[int, int, int, int]
#: Of what lies in one line.
LINE: Strides = (0, 0, 0, 1)


@dataclass
class Draft:
    """An instruction whose tensors have no place yet.

    Attributes:
        operation, sizes, share, number, factor: see ``program.cpp``.
        out, a, b, c: tensors with their strides over ``sizes``, in elements.
        reads, writes: tensors besides these that ``attend`` touches.
        attend: gives the arguments of ATTEND or ATTEND_CODED once told where each tensor lies.
        temporary: storages that were made for the draft.
    """

    operation: Operation
    sizes: Strides
    out: tuple[Tensor, Strides] | None = None
    a: tuple[Tensor, Strides] | None = None
    b: tuple[Tensor, Strides] | None = None
    c: tuple[Tensor, Strides] | None = None
    share: Share = Share.NONE
    number: float = 0.0
    factor: float = 1.0
    reads: Sequence[Tensor] = ()
    writes: Sequence[Tensor] = ()
    attend: Callable[[Callable[[Tensor], Tensor]], Attend] | None = None
    temporary: set[int] = field(default_factory=set)

    def tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what it reads, and what it writes."""
        inputs = [operand[0] for operand in (self.a, self.b, self.c) if operand is not None]
        outputs = [] if self.out is None else [self.out[0]]
        return [*inputs, *self.reads], [*outputs, *self.writes]


def storage_of(tensor: Tensor) -> int:
    """Return the address of a tensor's storage, equal for all tensors over the same memory."""
    return int(tensor.untyped_storage().data_ptr())
