"""Compile the loops in C++ with the compiler and the flags of PyTorch's Inductor, once."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.ops.native.structs import (
    FLOATS,
    Attend,
    AttendCoded,
    AttendPaged,
    Format,
    Received,
    check_size,
)

_ATTENTION = ("lanes.h", "attention.cpp", "coded.cpp")
_SOURCES = (*_ATTENTION, "rkv.cpp", "paged.cpp", "rows.cpp", "budgets.cpp")
_FLAGS: tuple[str, ...] = ("-ffp-contract=fast",)  # besides those of Inductor
_P, _I, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_F, _D = ctypes.c_float, ctypes.c_double
#: Arguments and result of a function in C++.
Signature = tuple[list[Any], Any]
#: Bytes of the structures that attention reads.
SIZES: dict[str, Signature] = {
    f"bytes_of_{name}": ([], _I) for name in ("attend", "attend_coded", "format")
}
_FUNCTIONS: dict[str, Signature] = {
    "attend": ([_P, _N], _N),
    "attend_coded": ([_P, _N], _N),
    "attend_paged": ([_P, _N], _N),
    "received": ([_P, _N], _N),
    "move_tokens": ([_P] * 3 + [_I, _N], _N),
    "bytes_of_attend_paged": ([], _I),
    "bytes_of_received": ([], _I),
    "rkv_scores": ([_P] * 5 + [_I] * 8 + [_F] * 3 + [_P] + [_N] * 2, _N),
    "move_rows": ([_P] * 5 + [_I] * 6 + [_N], _N),
    "robustify": ([_P] * 4 + [_D] + [_I] * 2 + [_P], _N),
    "pooled_counts": ([_P] * 3 + [_I, _N] + [_I] * 3 + [_P, _N], _N),
    "select": ([_P] * 3 + [_I, _D, _P] + [_I] * 2 + [_P, _N], _N),
    "knows": ([_N], _N),
    **SIZES,
}
_OWN_INCLUDE = re.compile(r'^#(include "[^"]+"|pragma once)$', re.MULTILINE)


def require(
    option: str,
    instead: str,
    dtype: torch.dtype | None = None,
    load: Callable[[], Any] | None = None,
) -> None:
    """Make sure that functions in C++ can be had, and know an element type.

    Args:
        option, instead: what was asked for, and what works without them, for the messages.
        dtype: of the model, if it is known.
        load: compiles them; None: ``library``.

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
        functions = (library if load is None else load)()
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
    if not functions.reasonalloc_knows(FLOATS[dtype]):
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
    """Return the functions of this folder, see ``require``; PyTorch keeps them on disk."""
    functions = compiled([Path(__file__).with_name(name) for name in _SOURCES], _FUNCTIONS)
    check_attention(functions)
    check_size(functions, "attend_paged", AttendPaged)
    check_size(functions, "received", Received)
    return functions


def check_attention(functions: Any) -> None:
    """Make sure that attention in C++ reads the structures of ``structs``.

    Raises:
        RuntimeError: it does not.
    """
    check_size(functions, "attend", Attend)
    check_size(functions, "attend_coded", AttendCoded)
    check_size(functions, "format", Format)


def compiled(sources: Sequence[Path], functions: Mapping[str, Signature]) -> Any:
    """Compile files as one, each after what it includes.

    Args:
        sources: files of this package; the lines that include one another are left out.
        functions: what is in them, ``reasonalloc_`` left out.
    """
    from torch._inductor.codecache import CppCodeCache

    text = "\n".join(_OWN_INCLUDE.sub("", path.read_text(encoding="utf-8")) for path in sources)
    loaded = CppCodeCache.load(text, extra_flags=_FLAGS)
    for name, (arguments, result) in functions.items():
        function = getattr(loaded, f"reasonalloc_{name}")
        function.argtypes, function.restype = arguments, result
    return loaded


def attention_sources() -> list[Path]:
    """Return the files that attention needs, for who compiles more behind them."""
    return [Path(__file__).with_name(name) for name in _ATTENTION]
