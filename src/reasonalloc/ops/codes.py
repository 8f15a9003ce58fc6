"""Keys and values in fewer bits: formats, and their reference in plain PyTorch.

A token of a head is one row of bytes, so that moving it moves its bits:

    [codes of the key][codes of the value][numbers of the key][numbers of the value][padding]

*Codes* are a byte, or half a byte, per number of the vector; the *numbers* that scale them are in
float16. Formats:

- ``int8``: symmetric, ``x = scale * code``, codes from -127 to 127, one scale per vector.
- ``fp8``: e4m3 codes, one scale per vector, so that the largest number becomes 448.
- ``int4``: groups of 32 along the vector (the last may be smaller), ``x = offset + scale * code``,
  codes from 0 to 15. Byte ``i`` of a group of ``g`` holds number ``i`` in its low half and number
  ``i + g / 2`` in its high half, so that both halves of a register are neighbours in the vector.
- ``int4h``: ``int4`` of a key after a fixed Hadamard rotation, which spreads what single channels
  hold over all of them (QuaRot, arXiv 2404.00456). A query that is rotated alike has the same
  products with it.
- ``auto``: the vector as it is.

Scales are rounded to float16 before the codes are chosen, which therefore fit what is read back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from reasonalloc.errors import UsageError
from reasonalloc.kinds import KINDS, VALUE_KINDS, parse_kinds

__all__ = [
    "GROUP",
    "KINDS",
    "VALUE_KINDS",
    "Field",
    "RowFormat",
    "parse_kinds",
    "rotated",
    "row_format",
]

#: Numbers that share a scale and an offset in ``int4``.
GROUP = 32
_LARGEST = 65504.0  # of float16


@dataclass(frozen=True)
class Field:
    """How one vector lies in a row of bytes.

    Attributes:
        kind: a key of ``KINDS``.
        dim: numbers of the vector.
        dtype: of the vector outside of the row.
    """

    kind: str
    dim: int
    dtype: torch.dtype

    @property
    def code_bytes(self) -> int:
        """Bytes of its codes."""
        if self.kind == "auto":
            return self.dim * self.dtype.itemsize
        return self.dim // 2 if self.kind in ("int4", "int4h") else self.dim

    @property
    def numbers(self) -> int:
        """float16 numbers that scale its codes."""
        if self.kind == "auto":
            return 0
        return 2 * -(-self.dim // GROUP) if self.kind in ("int4", "int4h") else 1

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes [..., code_bytes] uint8 and numbers [..., numbers] float16 of [..., dim]."""
        if self.kind == "auto":
            return x.to(self.dtype).contiguous().view(torch.uint8), x.new_empty(
                *x.shape[:-1], 0, dtype=torch.float16
            )
        x = x.float()
        if self.kind == "int4h":
            x = rotated(x)
        if self.kind in ("int4", "int4h"):
            return _encode_int4(x)
        top = 127.0 if self.kind == "int8" else 448.0
        scale = _divided(x.abs().amax(dim=-1, keepdim=True), top).clamp_max(_LARGEST).half()
        codes = x / scale.float().masked_fill(scale == 0, torch.inf)
        codes = codes.clamp(-top, top)
        if self.kind == "int8":
            return codes.round().to(torch.int8).view(torch.uint8), scale
        return codes.to(torch.float8_e4m3fn).view(torch.uint8), scale

    def decode(self, codes: Tensor, numbers: Tensor, unrotate: bool = True) -> Tensor:
        """Return vectors [..., dim] in float32 (``auto``: as they are).

        Args:
            codes: [..., code_bytes] uint8; numbers: [..., numbers] float16.
            unrotate: give the vector itself; else as it was encoded, for rotated queries.
        """
        if self.kind == "auto":
            # A copy: a single row may begin at an address that its type does not allow.
            return codes.clone(memory_format=torch.contiguous_format).view(self.dtype)
        if self.kind in ("int4", "int4h"):
            x = _decode_int4(codes, numbers, self.dim)
            return rotated(x) if unrotate and self.kind == "int4h" else x
        kind = torch.int8 if self.kind == "int8" else torch.float8_e4m3fn
        return codes.contiguous().view(kind).float() * numbers.float()


@dataclass(frozen=True)
class RowFormat:
    """How a token of one head lies in memory.

    Attributes:
        key, value: its vectors.
    """

    key: Field
    value: Field

    @property
    def value_at(self) -> int:
        """First byte of the value's codes; the key's begin at 0."""
        return self.key.code_bytes

    @property
    def key_numbers_at(self) -> int:
        """First byte of the numbers of the key."""
        codes = self.key.code_bytes + self.value.code_bytes
        return codes + codes % 2

    @property
    def value_numbers_at(self) -> int:
        """First byte of the numbers of the value."""
        return self.key_numbers_at + 2 * self.key.numbers

    @property
    def width(self) -> int:
        """Bytes of a row: a multiple of its widest number's."""
        width = self.value_numbers_at + 2 * self.value.numbers
        wide = [f.dtype.itemsize for f in (self.key, self.value) if f.kind == "auto"]
        step = max([2, *wide])
        return -(-width // step) * step

    def encode(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return rows [..., width] uint8 of [..., dim] keys and values."""
        codes, numbers = self.key.encode(keys)
        value_codes, value_numbers = self.value.encode(values)
        row = codes.new_zeros(*codes.shape[:-1], self.width)
        row[..., : self.value_at] = codes
        row[..., self.value_at : self.value_at + self.value.code_bytes] = value_codes
        row[..., self.key_numbers_at : self.value_numbers_at] = _bytes(numbers)
        end = self.value_numbers_at + 2 * self.value.numbers
        row[..., self.value_numbers_at : end] = _bytes(value_numbers)
        return row

    def decode(self, rows: Tensor, unrotate: bool = True) -> tuple[Tensor, Tensor]:
        """Return keys [..., dim] and values [..., value_dim] of rows [..., width] uint8.

        Args:
            rows: see ``encode``.
            unrotate: of the keys, see ``Field.decode``; values are always themselves.
        """
        end = self.value_at + self.value.code_bytes
        keys = self.key.decode(
            rows[..., : self.value_at],
            _halves(rows[..., self.key_numbers_at : self.value_numbers_at]),
            unrotate,
        )
        last = self.value_numbers_at + 2 * self.value.numbers
        values = self.value.decode(
            rows[..., self.value_at : end], _halves(rows[..., self.value_numbers_at : last])
        )
        return keys, values


def row_format(
    kv_dtype: str, dim: int, value_dim: int, dtype: torch.dtype, name: str = "the model"
) -> RowFormat:
    """Return how tokens lie under a ``kv_dtype``.

    Args:
        kv_dtype: see ``parse_kinds``.
        dim, value_dim: numbers of a key and of a value.
        dtype: of the cache.
        name: what messages call the model.

    Raises:
        UsageError: heads that a format cannot hold.
    """
    kinds = parse_kinds(kv_dtype)
    for kind, width in zip(kinds, (dim, value_dim), strict=True):
        if kind in ("int4", "int4h") and width % 2:
            raise UsageError(
                f"kv_dtype={kv_dtype!r}: {name} has heads of {width} numbers, and 4 bits go in "
                "pairs: use int8"
            )
    return RowFormat(Field(kinds[0], dim, dtype), Field(kinds[1], value_dim, dtype))


def rotated(x: Tensor) -> Tensor:
    """Return [..., dim] float32 times a Hadamard matrix, which is its own inverse.

    Blocks of the largest power of two that divides ``dim`` are rotated apart.
    """
    dim = x.shape[-1]
    size = dim & -dim
    return (x.reshape(*x.shape[:-1], dim // size, size) @ _hadamard(size, x.device)).reshape(
        x.shape
    )


@lru_cache(maxsize=32)
def _hadamard(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        matrix: Tensor = torch.ones(1, 1, dtype=torch.float32, device=device)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        return matrix.div_(size**0.5)


def _divided(x: Tensor, number: float) -> Tensor:
    """``x / number``, on every device alike: a GPU would multiply by the rounded reciprocal."""
    return x / torch.full_like(x, number)


def _encode_int4(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, numbers = [], []
    for group in x.split(GROUP, dim=-1):
        low, high = group.amin(dim=-1, keepdim=True), group.amax(dim=-1, keepdim=True)
        scale = _divided(high - low, 15).clamp_max(_LARGEST).half()
        offset = low.clamp(-_LARGEST, _LARGEST).half()
        code = (group - offset.float()) / scale.float().masked_fill(scale == 0, torch.inf)
        code = code.round().clamp(0, 15).to(torch.uint8)
        first, second = code.chunk(2, dim=-1)
        codes.append(first | second << 4)
        numbers += [scale, offset]
    return torch.cat(codes, dim=-1), torch.cat(numbers, dim=-1)


def _decode_int4(codes: Tensor, numbers: Tensor, dim: int) -> Tensor:
    parts = []
    for index, group in enumerate(codes.split(GROUP // 2, dim=-1)):
        code = torch.cat([group & 15, group >> 4], dim=-1).float()
        scale, offset = (numbers[..., 2 * index + i, None].float() for i in (0, 1))
        parts.append(offset + scale * code)
    return torch.cat(parts, dim=-1)[..., :dim]


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8)


def _halves(rows: Tensor) -> Tensor:
    return rows.contiguous().view(torch.float16)
