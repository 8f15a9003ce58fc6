"""Compile the loops in C++ with the compiler and the flags of PyTorch's Inductor, once."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.ops.native.structs import FLOATS, check_layout

_SOURCES = (
    "ops/native/lanes.h",
    "ops/native/attention.cpp",
    "cpu_step/products.cpp",
    "cpu_step/elementwise.cpp",
    "cpu_step/program.cpp",
    "ops/native/rkv.cpp",
    "ops/native/rows.cpp",
    "ops/native/budgets.cpp",
)
_FLAGS: tuple[str, ...] = ("-ffp-contract=fast",)  # besides those of Inductor
_P, _I, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_F, _D = ctypes.c_float, ctypes.c_double
_ARGUMENTS = {
    "attend": ([_P, _N], _N),
    "run": ([_P, _I, _N], _N),
    "rkv_scores": ([_P] * 5 + [_I] * 8 + [_F] * 3 + [_N] * 2, _N),
    "move_rows": ([_P] * 5 + [_I] * 6 + [_N], _N),
    "robustify": ([_P] * 4 + [_D] + [_I] * 2 + [_P], _N),
    "pooled_counts": ([_P] * 3 + [_I, _N] + [_I] * 3 + [_P, _N], _N),
    "select": ([_P] * 3 + [_I, _D, _P] + [_I] * 2 + [_P, _N], _N),
    "knows": ([_N], _N),
    "bytes_of_operand": ([], _I),
    "bytes_of_instruction": ([], _I),
    "bytes_of_attend": ([], _I),
    "operations": ([], ctypes.c_char_p),
}


def require(option: str, instead: str, dtype: torch.dtype | None = None) -> None:
    """Make sure that the functions of this folder can be had, and know an element type.

    Args:
        option, instead: what was asked for, and what works without them, for the messages.
        dtype: of the model, if it is known.

    Raises:
        UsageError: there is no compiler.
        UnsupportedError: it cannot compile them, in its own words, or does not know the type.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UsageError(
            f"{option} needs a C++ compiler, and none was found: install g++ (or name one in the "
            f"environment variable CXX), or use {instead}"
        ) from error
    try:
        found = library()
    except Exception as error:
        raise UnsupportedError(
            f"{option} cannot be compiled ({_compiler_message(error)}): use {instead}"
        ) from error
    if dtype is None:
        return
    if dtype not in FLOATS:
        known = ", ".join(str(kind) for kind in FLOATS)
        raise UnsupportedError(
            f"{option} computes in {known}, but the model is in {dtype}: use {instead}"
        )
    if not found.reasonalloc_knows(FLOATS[dtype]):
        raise UnsupportedError(
            f"{option}: this C++ compiler does not know {dtype} (g++ 12 does): use a newer one, or "
            f"{instead}"
        )


def _compiler_message(error: Exception) -> str:
    """One line: what the C++ compiler said, else what the exception says first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if " error: " in line] + lines
    return lines[0] if lines else type(error).__name__


@functools.cache
def library() -> Any:
    """The functions of this folder; PyTorch keeps the machine code on disk. See ``require``."""
    from torch._inductor.codecache import CppCodeCache

    folder = Path(__file__).parents[2]
    source = "\n".join((folder / name).read_text(encoding="utf-8") for name in _SOURCES)
    found = CppCodeCache.load(source, extra_flags=_FLAGS)
    for name, (arguments, result) in _ARGUMENTS.items():
        function = getattr(found, f"reasonalloc_{name}")
        function.argtypes, function.restype = arguments, result
    check_layout(found)
    return found


def loaded() -> bool:
    """Whether ``library`` has been asked for, and found."""
    return library.cache_info().currsize > 0
