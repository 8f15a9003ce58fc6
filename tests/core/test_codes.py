"""Formats of keys and values in fewer bits: their layout, byte by byte, and what they lose."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coded_layers import KINDS, random_rows
from examples import examples
from reasonalloc.errors import UsageError
from reasonalloc.ops.codes import (
    GROUP,
    VALUE_KINDS,
    Field,
    RowFormat,
    parse_kinds,
    rotated,
    row_format,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Half a step of the smallest numbers of float16, which scales and offsets are rounded to.
TINY = 2.0**-25


def vectors(seed: int, dim: int) -> torch.Tensor:
    """[8, dim] float32 of very different magnitudes, some zero or constant."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, dim, generator=generator)
    x *= 10.0 ** torch.randint(-4, 4, (8, 1), generator=generator)
    x[0], x[1] = 0.0, float(x[1, 0])
    x[2] += 3.0
    return x


def through(field: Field, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is read back, and the numbers in float32."""
    codes, numbers = field.encode(x)
    assert codes.dtype == torch.uint8 and codes.shape == (len(x), field.code_bytes)
    assert numbers.dtype == torch.float16 and numbers.shape == (len(x), field.numbers)
    return field.decode(codes, numbers).float(), numbers.float()


@given(st.integers(0, 10**6), st.sampled_from([8, 24, 33, 80, 128]))
@examples(40)
def test_what_int8_and_fp8_lose(seed: int, dim: int) -> None:
    x = vectors(seed, dim)
    back, scale = through(Field("int8", dim, torch.float32), x)
    assert ((back - x).abs() <= scale * 0.5001 + 127 * TINY).all()
    back, scale = through(Field("fp8", dim, torch.float32), x)
    # Half a step of three bits, or of the smallest codes.
    assert ((back - x).abs() <= x.abs() * 2**-4 * 1.0001 + scale * 2**-10 + 448 * TINY).all()


@pytest.mark.parametrize("kind", ["int4", "int4h"])
@given(st.integers(0, 10**6), st.sampled_from([8, 24, 32, 80, 128]))
@examples(40)
def test_what_int4_loses(kind: str, seed: int, dim: int) -> None:
    x = vectors(seed, dim)
    field = Field(kind, dim, torch.float32)
    codes, numbers = field.encode(x)
    back, x = field.decode(codes, numbers, unrotate=False), rotated(x) if kind == "int4h" else x
    for index, (group, read) in enumerate(
        zip(x.split(GROUP, -1), back.split(GROUP, -1), strict=True)
    ):
        scale, offset = numbers[:, 2 * index : 2 * index + 2, None].float().unbind(1)
        limit = scale * 0.51 + offset.abs() * 2**-10 + 16 * TINY
        assert ((read - group).abs() <= limit).all()


@pytest.mark.parametrize("kind", ["int8", "int4", "int4h", "fp8"])
def test_special_vectors(kind: str) -> None:
    field = Field(kind, 64, torch.float32)
    assert not through(field, torch.zeros(2, 64))[0].any()
    constant = torch.full((1, 64), -2.5)
    torch.testing.assert_close(through(field, constant)[0], constant, rtol=1e-2, atol=0)
    for number in (3e4, 1e30):  # of which the larger is too large for the scale
        huge = torch.tensor([number, -number]).repeat(1, 32)
        back = through(field, huge)[0]
        assert back.isfinite().all() and back.any()
        if number < 1e5:
            torch.testing.assert_close(back, huge, rtol=2e-3, atol=huge.abs().max() * 2e-3)


@given(st.integers(0, 10**6), st.sampled_from([2, 24, 64, 80, 96, 256]))
@examples(20)
def test_the_rotation_is_its_own_inverse(seed: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 5, dim, generator=generator)
    torch.testing.assert_close(rotated(rotated(x)), x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        (rotated(x) * rotated(y)).sum(-1), (x * y).sum(-1), rtol=1e-4, atol=1e-4
    )


def read_field(field: Field, row: bytes, codes_at: int, numbers_at: int) -> list[float]:
    """One vector from a row's bytes, as the documentation says that they lie; not rotated back."""
    codes = row[codes_at : codes_at + field.code_bytes]
    numbers = struct.unpack_from(f"<{field.numbers}e", row, numbers_at)
    if field.kind == "auto":
        return torch.frombuffer(bytearray(codes), dtype=field.dtype).tolist()
    if field.kind == "int8":
        return [numbers[0] * code for code in struct.unpack(f"<{field.dim}b", codes)]
    if field.kind == "fp8":
        return [numbers[0] * e4m3(code) for code in codes]
    result = []
    for number in range(field.dim):
        group, place = divmod(number, GROUP)
        half = min(GROUP, field.dim - group * GROUP) // 2
        byte = codes[group * GROUP // 2 + place % half]
        code = byte & 15 if place < half else byte >> 4
        result.append(numbers[2 * group + 1] + numbers[2 * group] * code)
    return result


def e4m3(code: int) -> float:
    """The number of a byte: sign, four bits of exponent, three of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    size = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8
    return sign * size


@given(
    st.integers(0, 10**6),
    st.sampled_from(KINDS),
    st.sampled_from([(24, 16), (64, 64), (80, 48), (40, 256)]),
    st.sampled_from(DTYPES),
)
@examples(60)
def test_layout(seed: int, kind: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    form = row_format(kind, *dims, dtype)
    rows = random_rows(form, 3, torch.Generator().manual_seed(seed))
    assert rows.shape == (3, form.width)
    keys, values = form.decode(rows, unrotate=False)
    for row, key, value in zip(rows, keys, values, strict=True):
        data = bytes(row.tolist())
        read = read_field(form.key, data, 0, form.key_numbers_at)
        torch.testing.assert_close(key.float(), torch.tensor(read), rtol=1e-6, atol=1e-7)
        read = read_field(form.value, data, form.value_at, form.value_numbers_at)
        torch.testing.assert_close(value.float(), torch.tensor(read), rtol=1e-6, atol=1e-7)


def test_widths() -> None:
    """Bytes of a token and head: codes, numbers, padding to whole numbers."""
    bf16 = torch.bfloat16
    wide = {"auto": 512, "int8": 260, "fp8": 260, "int4": 160, "int8:int4": 210, "int4h:int8": 210}
    assert {kind: row_format(kind, 128, 128, bf16).width for kind in wide} == wide
    assert row_format("int8", 33, 32, bf16).key_numbers_at == 66  # of 65 bytes of codes
    assert row_format("int8:auto", 24, 24, torch.float32).width == 124  # of 24 + 96 + 2
    for kind in KINDS:
        for dtype in DTYPES:
            form = row_format(kind, 80, 48, dtype)
            step = dtype.itemsize if "auto" in (form.key.kind, form.value.kind) else 2
            assert form.width % step == form.key_numbers_at % 2 == form.value_numbers_at % 2 == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_keeps_every_bit(dtype: torch.dtype) -> None:
    keys, values = torch.randn(2, 5, 24).to(dtype)
    read = row_format("auto", 24, 24, dtype)
    for back, given_ in zip(read.decode(read.encode(keys, values)), (keys, values), strict=True):
        assert back.dtype == dtype and torch.equal(back, given_)


def test_a_single_row_whose_values_begin_at_an_odd_byte() -> None:
    form = RowFormat(Field("int8", 33, torch.float32), Field("auto", 7, torch.float32))
    keys, values = torch.randn(1, 33), torch.randn(1, 7)
    assert torch.equal(form.decode(form.encode(keys, values))[1], values)


def test_names_of_formats() -> None:
    assert parse_kinds("int4h") == ("int4h", "int4") and parse_kinds("fp8") == ("fp8", "fp8")
    for kind in VALUE_KINDS:
        assert parse_kinds(f"int4h:{kind}") == ("int4h", kind)
    for text in ("int3", "int8:int4h", "int8:int8:int8", "", ":", "INT8"):
        with pytest.raises(UsageError, match=r"kv_dtype='.*' must be one of auto, int8"):
            parse_kinds(text)
    for kv_dtype in ("int4", "int4h:int8", "int8:int4"):
        with pytest.raises(UsageError, match="has heads of 33 numbers, and 4 bits go in pairs"):
            row_format(kv_dtype, 33, 33, torch.float16)
    assert row_format("int8", 33, 33, torch.float16).width == 70
