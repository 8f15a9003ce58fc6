"""The launcher of attention over coded pages: what it refuses, and that it reads no data.

What it computes is in paged_coded_cases.py, which test_triton.py runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from reasonalloc.attention.kernels.paged import (
    PLAIN,
    CodedTables,
    Pool,
    RunTables,
    coded,
    coded_splits,
    paged_decode_coded,
    scratch_floats,
)
from reasonalloc.ops.codes import row_format
from reasonalloc.ops.page_rows import PageRows

LAYERS, HEADS, GROUP, SIZE, DIM, BLOCKS, ROWS, SLOTS = 3, 2, 4, 16, 64, 9, 2, 5
QUERY_HEADS, PAGE_BYTES = HEADS * GROUP, 2 * SIZE * DIM * 2


def int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def rows(*kinds: str, **changes: Any) -> list[PageRows]:
    made = {
        "dim": DIM,
        "value_dim": DIM,
        "dtype": torch.float16,
        "page_bytes": PAGE_BYTES,
    } | changes
    page_bytes = made.pop("page_bytes")
    return [PageRows(row_format(kind, **made), 1, page_bytes) for kind in kinds]


def decoding() -> dict[str, Any]:
    """Arguments of ``paged_decode_coded``."""
    query = torch.zeros(ROWS, QUERY_HEADS, DIM, dtype=torch.float16)
    pool = Pool.of(torch.zeros(BLOCKS, LAYERS, HEADS, SIZE, 2 * DIM, dtype=torch.float16))
    table = (LAYERS, SLOTS, HEADS)
    splits, tail_splits = coded_splits(ROWS, 900, 200, query, pool)
    floats = scratch_floats(ROWS, QUERY_HEADS, DIM, splits + tail_splits)
    return {
        "query": query,
        "pool": pool,
        "tables": RunTables(int32(*table), int32(*table), int32(SLOTS) + PLAIN),
        "coded": CodedTables(int32(*table), int32(*table)),
        "rows": rows("int8:int4", "int4h"),
        "layer": 1,
        "block_table": int32(ROWS, 4),
        "seq_lens": int32(ROWS),
        "slots": int32(ROWS),
        "out": torch.zeros_like(query),
        "lse": torch.zeros(ROWS, QUERY_HEADS),
        "scratch": torch.zeros(floats),
        "splits": splits,
        "tail_splits": tail_splits,
        "scaling": 0.125,
        "sinks": torch.zeros(QUERY_HEADS),
    }


def test_tensors_without_data() -> None:
    with FakeTensorMode():
        for count in (ROWS, 0):
            arguments = decoding()
            for name in ("query", "out", "lse", "slots", "seq_lens", "block_table"):
                arguments[name] = arguments[name][:count]
            paged_decode_coded(**arguments)
            paged_decode_coded(**arguments | {"sinks": None})


def as_(dtype: torch.dtype) -> Callable[[Any], Any]:
    return lambda x: x.to(dtype)


def first_rows(x: Any) -> Any:
    return x[:1]


def of(dtype: torch.dtype) -> Callable[[Any], Any]:
    return lambda pool: replace(pool, data=pool.data.to(dtype))


MISTAKES: dict[str, list[Callable[[Any], Any]]] = {
    "query": [first_rows, as_(torch.float64), lambda x: x[..., :32], lambda x: x[:, :7]],
    "out": [first_rows, as_(torch.float32), lambda x: x.transpose(1, 2)],
    "lse": [first_rows, as_(torch.float16)],
    "scratch": [lambda x: x[1:], lambda x: x[:, None], as_(torch.float16)],
    "sinks": [as_(torch.float16), first_rows],
    "seq_lens": [as_(torch.int64), first_rows],
    "slots": [as_(torch.int64), lambda x: x.repeat(2)[::2]],
    "block_table": [as_(torch.int64), first_rows, lambda x: x[0]],
    "layer": [lambda x: LAYERS, lambda x: -1],
    "splits": [lambda x: 0, lambda x: 64],
    "tail_splits": [lambda x: 0, lambda x: 64],
    "pool": [
        lambda x: replace(x, heads=1),
        of(torch.uint8),
        of(torch.float8_e4m3fn),
        of(torch.float32),  # in which rows have other pages, and other numbers
        lambda x: replace(x, token_stride=2 * DIM + 2),
        lambda x: replace(x, value_at=DIM + 2),
        lambda x: replace(x, token_stride=DIM),
    ],
    "tables": [lambda x: RunTables(x.first[:2], x.shift[:2], x.plain)],
    "coded": [
        lambda x: CodedTables(x.coded[:2], x.begin[:2]),
        lambda x: CodedTables(x.coded, x.begin[:2]),
        lambda x: CodedTables(x.coded.long(), x.begin),
        lambda x: CodedTables(x.coded[0], x.begin[0]),
        lambda x: CodedTables(x.coded.transpose(0, 2), x.begin.transpose(0, 2)),
    ],
    "rows": [
        first_rows,
        lambda x: rows("int8", "fp8", page_bytes=PAGE_BYTES - 4),
        lambda x: rows("int8", "int8", dim=32),
        lambda x: rows("int8", "int8", value_dim=32),
        lambda x: rows("auto", "int8", dtype=torch.bfloat16),
        lambda x: [replace(row, channels=1024) for row in x],  # not one in a page
    ],
}


def test_what_a_kernel_would_take_for_something_else() -> None:
    with FakeTensorMode():
        paged_decode_coded(**decoding())
        for name, changes in MISTAKES.items():
            for number, change in enumerate(changes):
                arguments = decoding()
                with pytest.raises(RuntimeError) as caught:
                    arguments[name] = change(arguments[name])
                    paged_decode_coded(**arguments)
                assert "\n" not in str(caught.value), (name, number)


def test_pages_whose_values_lie_behind_their_keys() -> None:
    with FakeTensorMode():
        arguments = decoding()
        pool = replace(arguments["pool"], token_stride=DIM, value_at=SIZE * DIM)
        paged_decode_coded(**arguments | {"pool": pool})


def test_splits_follow_from_shapes() -> None:
    """Powers of two which one program joins, each from the bound of its own tokens."""
    arguments = decoding()
    query, pool = arguments["query"], arguments["pool"]
    assert coded_splits(0, 0, 0, query, pool) == (1, 1)
    assert coded_splits(1, 10**6, 10, query, pool) == coded_splits(1, 10, 10**6, query, pool)[::-1]
    numbers = (0, 1, 100, 900, 10**5)
    found = {
        coded_splits(count, most, tail, query, pool)
        for count in range(1, 70)
        for most in numbers
        for tail in numbers
    }
    assert len(found) > 3 and all(sum(pair) <= 64 for pair in found)
    assert {n & (n - 1) for pair in found for n in pair} == {0}


def test_prepared_before_a_graph_is_captured() -> None:
    """After that the first call finds everything on the device."""
    pool = decoding()["pool"]
    own = rows("int4h:int8", "int8")
    coded.prepare_coded(own, pool)
    known = coded._launches.cache_info().misses
    formats, which = coded._formats(tuple(own), SIZE, DIM, pool.data.dtype)
    assert [turns for _, turns, _ in coded._launches(formats, which, pool.data.device)] == [
        True,
        False,
    ]
    assert coded._launches.cache_info().misses == known
