"""What C++ and Python both read of a program: instructions, and numbers of operations and types."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import Any

import torch

from reasonalloc.ops.native.structs import FLOATS, check_size

#: Element types that instructions read, and their numbers there.
KINDS = {**FLOATS, torch.int64: 3, torch.int32: 4, torch.bool: 5}
_I = ctypes.c_int64


class Operation(IntEnum):
    """What an instruction does; the numbers of ``program.cpp``."""

    COPY = 0
    NEGATE = 1
    COSINE = 2
    SINE = 3
    INVERSE_ROOT = 4
    LOGISTIC = 5
    SILU = 6
    GELU = 7
    GELU_TANH = 8
    TANH = 9
    EXP = 10
    RELU = 11
    SQUARE = 12
    POWER = 13
    ADD = 14
    SUBTRACT = 15
    MULTIPLY = 16
    DIVIDE = 17
    SUM = 18
    COUNT = 19
    EMBED = 20
    PRODUCT = 21
    ATTEND = 22
    PANEL = 23
    ATTEND_CODED = 24


class Share(IntEnum):
    """How threads divide an instruction."""

    NONE = 0
    BLOCKS = 1
    """Each has blocks of its own, in an order that only the loops know."""
    ROWS = 2
    """Each has its part of the first dimension."""


class Operand(ctypes.Structure):
    """A tensor of an instruction: address, kind, strides in elements."""

    _fields_ = (("at", _I), ("kind", _I), ("strides", _I * 4))


class Instruction(ctypes.Structure):
    """See ``elementwise.cpp``."""

    _fields_ = (
        *((name, _I) for name in ("operation", "barrier", "share")),
        ("sizes", _I * 4),
        *((name, Operand) for name in ("out", "a", "b", "c")),
        ("number", ctypes.c_double),
        ("factor", ctypes.c_double),
    )


def check_layout(library: Any) -> None:
    """Make sure that C++ reads the same structures, and numbers operations alike.

    Raises:
        RuntimeError: names what differs.
    """
    check_size(library, "operand", Operand)
    check_size(library, "instruction", Instruction)
    names = library.reasonalloc_operations().decode().split()
    own_names = [operation.name.title().replace("_", "") for operation in Operation]
    if names != own_names:
        raise RuntimeError(f"operations are {names} in C++ and {own_names} here")
