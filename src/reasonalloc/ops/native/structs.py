"""What C++ and Python both read: numbers of types, and the arguments of attention."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from reasonalloc.ops.codes import KINDS, RowFormat

#: Element types that the loops compute with, and their numbers there.
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_I, _P, _TWO = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64 * 2


class Attend(ctypes.Structure):
    """The arguments of one call; holds addresses alone, their tensors must be kept."""

    _fields_ = (
        ("query", _P),
        ("query_kind", _I),
        ("query_strides", _TWO),
        ("key", _P),
        ("key_strides", _TWO),
        ("value", _P),
        ("value_strides", _TWO),
        ("keys", _P),
        ("key_kind", _I),
        ("values", _P),
        ("value_kind", _I),
        ("positions", _P),
        ("offsets", _P),
        ("lengths", _P),
        ("seen", _P),
        ("state", _P),
        ("channels", _I),
        ("ring", _P),
        ("window", _I),
        ("out", _P),
        ("received", _P),
        *((name, _I) for name in ("batch", "kv_heads", "group", "slots", "width", "value_width")),
        ("room", _I),
        ("before", _I),
        ("scaling", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("sinks", _P),
    )


class Format(ctypes.Structure):
    """How a token of one head lies in its bytes; see ``codes.RowFormat``."""

    _fields_ = (
        ("key_code", _I),
        ("value_code", _I),
        ("width", _I),
        ("value_at", _I),
        ("key_numbers_at", _I),
        ("value_numbers_at", _I),
    )

    @classmethod
    def of(cls, row: RowFormat, width: int | None = None) -> Format:
        """A format as C++ reads it; ``width``: bytes from row to row, if not the row's own."""
        return cls(
            KINDS[row.key.kind],
            KINDS[row.value.kind],
            row.width if width is None else width,
            row.value_at,
            row.key_numbers_at,
            row.value_numbers_at,
        )

    def numbers(self) -> tuple[int, ...]:
        """All of them, to be compared."""
        return tuple(getattr(self, name) for name, _ in self._fields_)


class AttendCoded(Attend):
    """The same where all but the newest tokens are coded: ``Attend`` is of the tails."""

    _fields_ = (
        ("pool", _P),
        ("pool_bytes", _I),
        ("formats", _P),
        ("starts", _P),
        ("run_offsets", _P),
        ("run_lengths", _P),
    )


class PagePool(ctypes.Structure):
    """Pages of ``width`` x ``size`` keys, then as many values."""

    _fields_ = (
        ("memory", _P),
        *((name, _I) for name in ("kind", "pages", "size", "width", "turned")),
    )


class CodedRuns(ctypes.Structure):
    """What runs in pages begin with: formats, whose each is, coded tokens and where these end."""

    _fields_ = (
        ("formats", _P),
        ("count", _I),
        ("of", _P),
        ("lengths", _P),
        ("begins", _P),
    )


class AttendPaged(Attend):
    """Attention over pages: of ``Attend`` what says where tokens lie is left out."""

    _fields_ = (
        ("pool", PagePool),
        ("table", _P),
        ("columns", _I),
        ("run_lengths", _P),
        ("places", _P),
        ("noted", _I),
        ("noted_tokens", _P),
        ("noted_rows", _P),
        ("noted_places", _P),
        ("ring_rows", _I),
        ("coded", CodedRuns),
    )


class Received(ctypes.Structure):
    """What each token of runs in pages received from each of several queries."""

    _fields_ = (
        ("pool", PagePool),
        *((name, _P) for name in ("queries", "table", "visible", "sinks", "out")),
        *((name, _I) for name in ("runs", "group", "asked", "columns", "tokens")),
        ("softcap", ctypes.c_double),
        ("coded", CodedRuns),
    )


def check_size(library: Any, name: str, structure: type[ctypes.Structure]) -> None:
    """Make sure that C++ reads a structure of the same size.

    Raises:
        RuntimeError: it does not.
    """
    theirs, own = getattr(library, f"reasonalloc_bytes_of_{name}")(), ctypes.sizeof(structure)
    if theirs != own:
        raise RuntimeError(f"{structure.__name__} has {theirs} bytes in C++ and {own} here")
