"""Latents beside the keys and values that they expand to: attention, observation and scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.attention import choose_backend
from reasonalloc.attention.latent import LatentHeads
from reasonalloc.config import CompressionConfig
from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.recorder import Recorder
from reasonalloc.policies import POLICIES, Candidates

ROTARY, PLAIN, VALUE = 4, 6, 5
#: Heads and rank: keys of all heads span the latents, and they do not.
SIZES = [(4, 12), (2, 12), (1, 8)]
sizes = pytest.mark.parametrize(("heads", "rank"), SIZES)


def made(heads: int, rank: int) -> LatentHeads:
    torch.manual_seed(heads * rank)
    return LatentHeads(torch.randn(heads * (PLAIN + VALUE), rank), heads, VALUE)


def side_by_side(x: Tensor) -> Tensor:
    """[batch, heads, n, dim] as one head of [batch, 1, n, heads * dim]."""
    return x.transpose(1, 2).flatten(2)[:, None]


@sizes
def test_what_policies_see_stands_for_the_keys_of_all_heads(heads: int, rank: int) -> None:
    """Products with each other and with queries are those of the expanded ones."""
    latent, tokens = made(heads, rank), torch.randn(2, 1, 30, rank + ROTARY)
    queries = torch.randn(2, heads, 7, PLAIN + ROTARY)
    keys, values = latent.expand(tokens)
    for seen, wide in (
        (latent.scored_keys(tokens), side_by_side(keys)),
        (latent.scored_values(tokens), side_by_side(values)),
    ):
        torch.testing.assert_close(seen @ seen.mT, wide @ wide.mT, rtol=1e-4, atol=1e-3)
    logits = latent.scored_queries(queries[:, None]) @ latent.scored_keys(tokens)[:, :, None].mT
    torch.testing.assert_close(logits[:, 0], queries @ keys.mT, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(latent.absorb(queries) @ tokens.mT, queries @ keys.mT)


@sizes
@pytest.mark.parametrize("policy", ["rkv", "snapkv", "tova", "knorm", "value_aware"])
def test_scores_are_those_of_the_expanded_keys(policy: str, heads: int, rank: int) -> None:
    latent, n, window = made(heads, rank), 24, 4
    tokens, queries = torch.randn(1, 1, n, rank + ROTARY), torch.randn(1, heads, window, 10)
    keys, values = latent.expand(tokens)
    wide = torch.zeros(1, 1, heads, window, heads, PLAIN + ROTARY)
    for head in range(heads):  # a query sees the keys of its own head alone
        wide[0, 0, head, :, head] = queries[0, head]

    def of(keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        torch.manual_seed(0)
        return POLICIES.create(policy).score(
            Candidates(
                lengths=torch.tensor([[n]]),
                positions=torch.arange(n)[None, None],
                load_keys=lambda: keys,
                load_values=lambda: values,
                queries=queries,
                query_positions=torch.arange(n - window, n)[None],
                state=torch.rand(1, 1, n, 1),
                seen=torch.tensor([n]),
                window=window,
                scaling=0.3,
                softcap=None,
                layer=0,
                seed=0,
            )
        )

    expected = of(side_by_side(keys), side_by_side(values), wide.flatten(4))
    seen = latent.scored_keys(tokens), latent.scored_values(tokens)
    found = of(*seen, latent.scored_queries(queries[:, None]))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "cpp"])
@sizes
def test_a_layer_attends_as_with_expanded_keys(
    attention: str, static: bool, heads: int, rank: int
) -> None:
    """Outputs at every step, in several turns; received attention is the mean over all heads."""
    latent, n = made(heads, rank), 30
    tokens, query = torch.randn(2, 1, n, rank + ROTARY), torch.randn(2, heads, n, PLAIN + ROTARY)
    keys, values = latent.expand(tokens)
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    weights = (query @ keys.mT * 0.3).masked_fill(future, -torch.inf).softmax(-1)
    layer = layer_of(attention)
    layer.latent = latent
    outs = []
    steps = [slice(0, 12), slice(12, 17), *(slice(i, i + 1) for i in range(17, n))]
    for at in steps:
        if static and at.start == 17:
            layer.fix()
            layer.static = True
        new = tokens[:, :, at]
        outs.append(layer.forward(query[:, :, at], new, new[..., :0], None, 0.3))
        if layer.static:
            layer.advance()
    torch.testing.assert_close(torch.cat(outs, dim=2), weights @ values, rtol=1e-4, atol=1e-4)
    slab: Any = layer.slab
    rows = slab.as_rows()
    received = weights.mean(dim=1, keepdim=True).sum(dim=2)
    torch.testing.assert_close(rows.gather(rows.state)[..., 0], received, rtol=1e-4, atol=1e-4)
    assert slab.kv_bytes == 2 * slab.slots * (rank + ROTARY) * 4 == slab.held_bytes * slab.slots / n


def layer_of(attention: str) -> LayerCompressor:
    """Of a budget that holds everything."""
    return LayerCompressor(
        0,
        64,
        CompressionConfig(budget=64, interval=8, window=4),
        POLICIES.create("h2o"),
        HEAD_ALLOCATORS.create("uniform"),
        choose_backend(attention),
        Recorder(),
    )
