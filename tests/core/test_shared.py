"""A cache that several layers read equals that of one layer with all their query heads."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.attention import choose_backend
from reasonalloc.config import Arm, CompressionConfig
from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.recorder import Recorder
from reasonalloc.core.shared import SharedCompressor, join_heads
from reasonalloc.errors import UnsupportedError
from reasonalloc.policies import POLICIES

KV_HEADS, DIM, WINDOW, INTERVAL = 2, 8, 4, 6
CPU = torch.device("cpu")


def compressors(
    policy: str, heads: str, readers: int, **settings: Any
) -> tuple[LayerCompressor, SharedCompressor]:
    config = CompressionConfig(
        budget=12, arm=Arm(policy, heads=heads), interval=INTERVAL, window=WINDOW, **settings
    )
    given = (
        0,
        config.budget * KV_HEADS,
        config,
        POLICIES.create(policy),
        HEAD_ALLOCATORS.create(heads),
        choose_backend(config.attention, CPU, torch.float32, compiled=False),
        Recorder("off"),
    )
    return LayerCompressor(*given), SharedCompressor(*given, readers=readers)


def tokens(seed: int, batch: int, group: int, readers: int, columns: int) -> list[Tensor]:
    """Queries of each reader, then keys and values."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(heads: int) -> Tensor:
        return torch.randn(batch, heads, columns, DIM, generator=generator) * 2

    return [*(drawn(KV_HEADS * group) for _ in range(readers)), drawn(KV_HEADS), drawn(KV_HEADS)]


def feed(
    one: LayerCompressor,
    shared: SharedCompressor,
    new: list[Tensor],
    mask: Tensor | None,
    softcap: float | None,
    sinks: list[Tensor] | None,
) -> None:
    """The same tokens to both: every reader gets what its heads get in one layer with all."""
    *queries, key, value = new
    wanted = one.forward(
        join_heads(queries, KV_HEADS),
        key,
        value,
        mask,
        0.3,
        softcap,
        sinks=None
        if sinks is None
        else join_heads([s[None, :, None, None] for s in sinks], 2).flatten(),
    )
    found = []
    for reader, query in enumerate(queries):
        assert shared.waiting == (len(queries) - reader if reader else 0)
        own = None if sinks is None else sinks[reader]
        found.append(shared.forward(query, key, value, mask, 0.3, softcap, sinks=own))
    assert shared.waiting == 0
    torch.testing.assert_close(join_heads(found, KV_HEADS), wanted)


def check_same(one: LayerCompressor, shared: SharedCompressor) -> None:
    assert one.slab is not None and shared.slab is not None
    assert torch.equal(one.slab.held, shared.slab.held)
    rows, others = one.slab.as_rows(), shared.slab.as_rows()
    kept = torch.arange(rows.index.shape[-1]) < rows.lengths[..., None]
    assert torch.equal(
        rows.gather(rows.positions).masked_fill(~kept, -1),
        others.gather(others.positions).masked_fill(~kept, -1),
    )
    assert one.bookkeeping_bytes == shared.bookkeeping_bytes


@pytest.mark.parametrize(
    ("policy", "heads"),
    [
        ("rkv", "reasonalloc"),
        ("snapkv", "uniform"),
        ("h2o", "adakv"),
        ("lazy_eviction", "uniform"),
        ("tova", "reasonalloc"),
        ("value_aware", "uniform"),
        ("streaming_llm", "uniform"),
    ],
)
@pytest.mark.parametrize(("readers", "group"), [(2, 1), (3, 2)])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_several_readers_are_one_with_all_their_heads(
    policy: str, heads: str, readers: int, group: int, static: bool, padded: bool
) -> None:
    one, shared = compressors(policy, heads, readers)
    generator = torch.Generator().manual_seed(7)
    sinks = [torch.randn(KV_HEADS * group, generator=generator) for _ in range(readers)]
    given = sinks if policy in ("rkv", "h2o") else None
    softcap = 20.0 if policy == "snapkv" else None
    seeds = itertools.count()

    def several(columns: int, padding: int) -> None:
        mask = None
        if padding:
            mask = torch.ones(columns, columns, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
            mask[1, :, :, :padding] = False
        feed(one, shared, tokens(next(seeds), 2, group, readers, columns), mask, softcap, given)
        check_same(one, shared)

    several(30, 5 if padded else 0)
    for _ in range(2):
        for layer in (one, shared):
            layer.fix() if static else None
            layer.static = static
        for _ in range(2 * INTERVAL + 3):
            feed(one, shared, tokens(next(seeds), 2, group, readers, 1), None, softcap, given)
            for layer in (one, shared):
                layer.advance() if static else None
            check_same(one, shared)
        for layer in (one, shared):
            layer.static = False
        several(9, 0)


def test_a_call_that_broke_off_is_forgotten() -> None:
    _, shared = compressors("rkv", "uniform", 2)
    first, _, key, value = tokens(0, 1, 1, 2, 9)
    shared.forward(first, key, value, None, 0.3)
    assert shared.waiting == 1
    shared.clear()
    assert shared.waiting == 0


def test_readers_that_cannot_be_joined() -> None:
    _, shared = compressors("rkv", "uniform", 2)
    first, second, key, value = tokens(0, 1, 1, 2, 9)
    with pytest.raises(UnsupportedError, match="with 1 of 9 queries"):
        shared.forward(first[:, :, -1:], key, value, None, 0.3)
    shared.forward(first, key, value, None, 0.3)
    with pytest.raises(UnsupportedError, match="attention logits differently"):
        shared.forward(second, key, value, None, 0.4)
