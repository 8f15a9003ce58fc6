"""A bias by distance beside keys that have a column for every position, which says the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.attention import choose_backend
from reasonalloc.attention.distance import DistanceBias
from reasonalloc.config import CompressionConfig
from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.recorder import Recorder
from reasonalloc.policies import POLICIES

BATCH, HEADS, KV_HEADS, DIM, EXTENT, TOKENS, SCALING = 3, 4, 2, 6, 9, 44, 0.4
PADDED = [0, 5, 2]


def layer_of(policy: str, heads: str, most: int = 24) -> LayerCompressor:
    return LayerCompressor(
        0,
        most,
        CompressionConfig(budget=most // KV_HEADS, interval=8, window=4),
        POLICIES.create(policy),
        HEAD_ALLOCATORS.create(heads),
        choose_backend("eager"),
        Recorder(),
    )


def positions(padded: bool) -> Tensor:
    """[batch, n], negative at padding."""
    places = torch.arange(TOKENS).expand(BATCH, -1)
    return places - torch.tensor(PADDED)[:, None] if padded else places


def columns(places: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """What queries [batch, heads, n, positions] and keys [batch, kv_heads, n, positions] get."""
    distance = places[:, :, None] - torch.arange(TOKENS)
    near = ((distance >= 0) & (distance < EXTENT))[:, None]
    index = distance.clamp(0, EXTENT - 1)[:, None].expand(-1, HEADS, -1, -1)
    of_queries = table.gather(-1, index).masked_fill(~near, 0.0) / SCALING
    of_keys = torch.nn.functional.one_hot(places.clamp_min(0), TOKENS).float()
    return of_queries, of_keys[:, None].expand(-1, KV_HEADS, -1, -1)


def fed(layer: LayerCompressor, new: tuple[Tensor, ...], padded: bool, how: str) -> Tensor:
    """Outputs of a prompt, of another chunk, and of single tokens, static ones or a replay."""
    outs = []
    parts = [slice(0, 14), slice(14, 20)]
    single = [slice(i, i + 1) for i in range(20, TOKENS)]
    for at in [*parts, *([slice(20, TOKENS)] if how == "replayed" else single)]:
        mask, size = None, at.stop - at.start
        if padded and at.start == 0:
            mask = torch.ones(BATCH, 1, size, size, dtype=torch.bool).tril()
            for row, padding in enumerate(PADDED):
                mask[row, :, :, :padding] = False
        if how == "static" and at.start == 20:
            layer.fix()
            layer.static = True
        query, key, value = (x[:, :, at] for x in new)
        outs.append(layer.forward(query, key, value, mask, SCALING, replay=how == "replayed"))
        if layer.static:
            layer.advance()
    return torch.cat(outs, dim=2)


@pytest.mark.parametrize("how", ["eager", "static", "replayed"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("heads", ["uniform", "adakv"])
@pytest.mark.parametrize("policy", ["snapkv", "tova", "h2o", "value_aware"])
def test_all_is_as_with_a_column_for_every_position(
    policy: str, heads: str, padded: bool, how: str
) -> None:
    torch.manual_seed(0)
    query, table = torch.randn(BATCH, HEADS, TOKENS, DIM), 2 * torch.randn(1, 1, 1, EXTENT)
    table = table + torch.randn(BATCH, HEADS, TOKENS, EXTENT)
    key, value = torch.randn(2, BATCH, KV_HEADS, TOKENS, DIM)
    wide = columns(positions(padded), table)
    plain, biased = layer_of(policy, heads), layer_of(policy, heads)
    biased.bias = DistanceBias(EXTENT)
    expected = fed(
        plain, (torch.cat([query, wide[0]], -1), torch.cat([key, wide[1]], -1), value), padded, how
    )
    found = fed(biased, (torch.cat([query, table], -1), key, value), padded, how)
    for row, padding in enumerate(PADDED if padded else [0] * BATCH):
        torch.testing.assert_close(
            found[row, :, padding:], expected[row, :, padding:], rtol=1e-4, atol=1e-4
        )
    ours: Any = biased.slab
    theirs: Any = plain.slab
    assert biased._recorder.compressions == plain._recorder.compressions > 2
    assert torch.equal(ours.lengths, theirs.lengths)
    rows = [slab.as_rows() for slab in (ours, theirs)]
    held = rows[0].held
    kept = [one.gather(one.positions)[held] for one in rows]
    assert torch.equal(*kept)


def test_only_near_keys_get_a_bias() -> None:
    table = torch.tensor([[1.0, 2.0, 3.0]])
    distance = torch.tensor([[-1, 0, 1, 2, 3, 100]])
    assert DistanceBias(3).of(table, distance).tolist() == [[0.0, 1.0, 2.0, 3.0, 0.0, 0.0]]
