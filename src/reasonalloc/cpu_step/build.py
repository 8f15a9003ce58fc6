"""Compile the loops of a whole decode step, with those of attention, once."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

from reasonalloc.cpu_step.structs import check_layout
from reasonalloc.ops.native.build import (
    SIZES,
    Signature,
    attention_sources,
    check_attention,
    compiled,
)

_SOURCES = ("products.cpp", "elementwise.cpp", "program.cpp")
_FUNCTIONS: dict[str, Signature] = {
    "run": ([ctypes.c_void_p, ctypes.c_int64, ctypes.c_int], ctypes.c_int),
    "knows": ([ctypes.c_int], ctypes.c_int),
    "bytes_of_operand": ([], ctypes.c_int64),
    "bytes_of_instruction": ([], ctypes.c_int64),
    "operations": ([], ctypes.c_char_p),
    **SIZES,
}


@functools.cache
def library() -> Any:
    """Return the functions of this folder, see ``ops.native.build.require``."""
    own = [Path(__file__).with_name(name) for name in _SOURCES]
    functions = compiled([*attention_sources(), *own], _FUNCTIONS)
    check_layout(functions)
    check_attention(functions)
    return functions
