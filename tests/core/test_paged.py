"""The paged kernels' launchers: what they refuse, and that nothing is read on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from reasonalloc.attention.kernels import paged
from reasonalloc.attention.kernels.paged import PLAIN, Pool, RunTables, paged_decode, paged_store

LAYERS, HEADS, GROUP, SIZE, DIM, BLOCKS, ROWS, SLOTS, TOKENS = 3, 2, 4, 16, 64, 9, 2, 5, 6
QUERY_HEADS = HEADS * GROUP


def int32(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def common(tokens: int) -> dict[str, Any]:
    return {
        "query": torch.zeros(tokens, QUERY_HEADS, DIM, dtype=torch.float16),
        "pool": Pool.of(torch.zeros(BLOCKS, LAYERS, HEADS, SIZE, 2 * DIM, dtype=torch.float16)),
        "tables": RunTables(
            int32(LAYERS, SLOTS, HEADS), int32(LAYERS, SLOTS, HEADS), int32(SLOTS) + PLAIN
        ),
        "layer": 1,
        "block_table": int32(ROWS, 4),
        "slots": int32(ROWS),
    }


def decoding() -> dict[str, Any]:
    """Arguments of ``paged_decode``."""
    arguments = common(ROWS)
    splits = paged.decode_splits(ROWS, 60, arguments["query"], arguments["pool"])
    floats = paged.scratch_floats(ROWS, QUERY_HEADS, DIM, splits)
    return arguments | {
        "seq_lens": int32(ROWS),
        "out": torch.zeros_like(arguments["query"]),
        "lse": torch.zeros(ROWS, QUERY_HEADS),
        "scratch": torch.zeros(floats),
        "splits": splits,
        "scaling": 0.125,
        "sinks": torch.zeros(QUERY_HEADS),
    }


def storing() -> dict[str, Any]:
    """Arguments of ``paged_store``."""
    return common(TOKENS) | {
        "key": torch.zeros(TOKENS, HEADS, DIM, dtype=torch.float16),
        "value": torch.zeros(TOKENS, HEADS, DIM, dtype=torch.float16),
        "token_row": int32(TOKENS),
        "token_position": int32(TOKENS),
        "ring": torch.zeros(3, 8, QUERY_HEADS, DIM, dtype=torch.float16),
        "ring_row": int32(TOKENS),
    }


def test_tensors_without_data() -> None:
    with FakeTensorMode():
        for rows in (ROWS, 0):
            arguments = decoding()
            for name in ("query", "out", "lse", "slots", "seq_lens", "block_table"):
                arguments[name] = arguments[name][:rows]
            paged_decode(**arguments)
        paged_store(**storing())
        paged_store(**storing() | {"ring": None, "ring_row": None})


def as_(dtype: torch.dtype) -> Callable[[Any], Any]:
    return lambda x: x.to(dtype)


def first_rows(x: Any) -> Any:
    return x[:1]


DECODE_MISTAKES: dict[str, list[Callable[[Any], Any]]] = {
    "query": [first_rows, as_(torch.float64), lambda x: x[..., :32], lambda x: x[:, :7]],
    "out": [first_rows, as_(torch.float32), lambda x: x.transpose(1, 2)],
    "lse": [first_rows, as_(torch.float16), lambda x: x.t().contiguous().t()],
    "scratch": [lambda x: x[1:], lambda x: x[:, None], as_(torch.float16)],
    "sinks": [as_(torch.float16), first_rows],
    "seq_lens": [as_(torch.int64), first_rows],
    "slots": [as_(torch.int64), lambda x: x.repeat(2)[::2]],
    "block_table": [as_(torch.int64), first_rows, lambda x: x.t().contiguous().t(), lambda x: x[0]],
    "layer": [lambda x: LAYERS, lambda x: -1],
    "splits": [lambda x: 0, lambda x: 65],
    "pool": [lambda x: replace(x, heads=1), lambda x: replace(x, head_dim=32)],
    "tables": [lambda x: RunTables(x.first[:2], x.shift[:2], x.plain)],
}
STORE_MISTAKES: dict[str, list[Callable[[Any], Any]]] = {
    "key": [first_rows, as_(torch.float32), lambda x: x[:, :1]],
    "value": [first_rows, lambda x: x.transpose(1, 2)],
    "query": [first_rows],
    "token_row": [as_(torch.int64), first_rows],
    "token_position": [as_(torch.int64), first_rows],
    "ring": [as_(torch.float32), lambda x: x[:, :0], lambda x: x[:, ::2], lambda x: None],
    "ring_row": [as_(torch.int64), first_rows, lambda x: None],
}


@pytest.mark.parametrize(
    ("launch", "made", "mistakes"),
    [(paged_decode, decoding, DECODE_MISTAKES), (paged_store, storing, STORE_MISTAKES)],
)
def test_what_a_kernel_would_take_for_something_else(
    launch: Callable[..., None],
    made: Callable[[], dict[str, Any]],
    mistakes: dict[str, list[Callable[[Any], Any]]],
) -> None:
    with FakeTensorMode():
        for name, changes in mistakes.items():
            for number, change in enumerate(changes):
                arguments = made()
                arguments[name] = change(arguments[name])
                with pytest.raises(RuntimeError) as caught:
                    launch(**arguments)
                assert "\n" not in str(caught.value), (name, number)


def test_pools() -> None:
    pages = torch.zeros(BLOCKS, LAYERS, HEADS, SIZE, 2 * DIM, dtype=torch.bfloat16)
    pool = Pool.of(pages)
    assert pool.blocks == BLOCKS and pool.strides[0] == pages[0].numel()
    turned = Pool.of(pages.transpose(0, 1).contiguous().transpose(0, 1))
    assert turned.blocks == BLOCKS and turned.block_stride < turned.layer_stride
    assert replace(pool, data=pages.flatten()[:-1]).blocks == BLOCKS - 1
    for wrong in (
        {"data": pages.flatten()[: pages[0].numel() - 1]},
        {"data": pages[:0]},
        {"data": pages.double()},
        {"token_stride": -1},
        {"block_stride": 0},
        {"layers": 0},
    ):
        with pytest.raises(RuntimeError):
            replace(pool, **wrong)
    for view in (pages[0], pages[..., ::2], pages[..., 1:]):
        with pytest.raises(RuntimeError, match="not"):
            Pool.of(view)


def test_splits_follow_from_shapes() -> None:
    arguments = common(1)
    query, pool = arguments["query"], arguments["pool"]
    assert paged.decode_splits(1, 10, query, pool) == 1
    assert paged.decode_splits(1, 10**6, query, pool) > paged.decode_splits(4, 10**6, query, pool)
    assert paged.decode_splits(0, 0, query, pool) == 1


def test_few_kernels_are_compiled() -> None:
    """A kernel per number of splits: whatever rows and lengths a server has, there are seven."""
    query, pool = decoding()["query"], common(1)["pool"]
    cases = [(rows, longest) for rows in range(1, 70) for longest in (0, 1, 100, 900, 10**5)]
    found = {paged.decode_splits(rows, longest, query, pool) for rows, longest in cases}
    assert found <= {1, 2, 4, 8, 16, 32, 64} and len(found) > 3
