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
from reasonalloc.policies import POLICIES, Candidates

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


@pytest.mark.parametrize("how", ["eager", "static", "replayed"])
def test_sinks_of_queries(how: str) -> None:
    """As a further logit of every query in its softmax, whose value is zero."""
    torch.manual_seed(0)
    query, table = torch.randn(BATCH, HEADS, TOKENS, DIM), torch.randn(BATCH, HEADS, TOKENS, EXTENT)
    key, value = torch.randn(2, BATCH, KV_HEADS, TOKENS, DIM)
    sinks = 2 * torch.randn(BATCH, HEADS, TOKENS, 1)
    layer = layer_of("h2o", "uniform", 2 * KV_HEADS * TOKENS)
    layer.bias = DistanceBias(EXTENT, sinks=True)
    found = fed(layer, (torch.cat([query, table, sinks], -1), key, value), False, how)
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    of_queries = columns(positions(False), table)[0] * SCALING
    logits = query @ keys.mT * SCALING + of_queries
    future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    whole = torch.cat([logits.masked_fill(future, -torch.inf), sinks], dim=-1)
    weights = whole.softmax(-1)[..., :-1]
    torch.testing.assert_close(found, weights @ values, rtol=1e-4, atol=1e-4)
    rows = layer.slab.as_rows()  # type: ignore[union-attr]
    received = weights.sum(dim=2).unflatten(1, (KV_HEADS, -1)).mean(dim=2)
    torch.testing.assert_close(rows.gather(rows.state)[..., 0], received, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["rkv", "snapkv", "tova"])
def test_scores_with_sinks_of_queries(policy: str) -> None:
    """Equal sinks of all queries are those of a head; others give other scores."""
    torch.manual_seed(0)
    n, window, group = 20, 4, HEADS // KV_HEADS
    keys, values = torch.randn(2, BATCH, KV_HEADS, n, DIM)
    queries = torch.randn(BATCH, KV_HEADS, group, window, DIM)
    heads = torch.randn(KV_HEADS, group)

    def scores(**sinks: Tensor) -> Tensor:
        return POLICIES.create(policy).score(
            Candidates(
                lengths=torch.full((BATCH, KV_HEADS), n),
                positions=torch.arange(n).expand(BATCH, KV_HEADS, -1),
                load_keys=lambda: keys,
                load_values=lambda: values,
                queries=queries,
                query_positions=torch.arange(n - window, n).expand(BATCH, -1),
                state=None,
                seen=torch.full((BATCH,), n),
                window=window,
                scaling=SCALING,
                softcap=None,
                layer=0,
                seed=0,
                **sinks,
            )
        )

    alike = heads[..., None].expand(BATCH, -1, -1, window)
    torch.testing.assert_close(scores(query_sinks=alike), scores(sinks=heads))
    assert not torch.allclose(scores(query_sinks=alike + torch.arange(window)), scores(sinks=heads))
