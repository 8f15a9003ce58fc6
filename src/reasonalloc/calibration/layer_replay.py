"""What one layer's attention gives under a budget, when everything before it is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.attention import choose_backend
from reasonalloc.config import CompressionConfig
from reasonalloc.core.cadence import compression_points
from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.recorder import Recorder
from reasonalloc.core.watched import Seen
from reasonalloc.policies import Policy


@torch.no_grad()
def outputs_under_budgets(
    seen: Seen,
    prompt: int,
    config: CompressionConfig,
    policy: Policy,
    budgets: Sequence[int],
) -> list[Tensor | None]:
    """Return the attention outputs of a layer, each head held to the same number of tokens.

    The text goes through ``LayerCompressor`` as in decoding: the prompt, a boundary, then
    ``interval`` tokens at a time. Heads with equal budgets do not influence one another, so every
    head's output is that of compressing it alone.

    Args:
        seen: what the layer saw.
        prompt: tokens of the text that are the prompt.
        config: cadence, format, what happens to the prompt and other options; its budget and arm
            are not looked at.
        policy: which tokens, bound to the model.
        budgets: tokens per head, each at least window and sinks.

    Returns:
        Per budget a tensor [n, query_heads, value_dim]; None where nothing is evicted before the
        last token, nor coded, so that the output is the full pass's.
    """
    last, pinned = seen.key.shape[2] - prompt - 1, config.pinned(prompt)
    return [
        # What a boundary after the last token evicts is not missed any more.
        _replay(seen, prompt, replace(config, budget=budget, record="off"), policy)
        if config.coded or compression_points(budget, 1, config.interval, prompt, last, pinned)
        else None
        for budget in budgets
    ]


def _replay(seen: Seen, prompt: int, config: CompressionConfig, policy: Policy) -> Tensor:
    """Return the layer's output [n, query_heads, value_dim] with equal budgets for its heads."""
    tokens, kv_heads = seen.key.shape[2], seen.kv_heads
    layer = LayerCompressor(
        seen.layer,
        config.budget * kv_heads,
        config,
        policy,
        HEAD_ALLOCATORS.create("uniform"),
        choose_backend(config.attention),
        Recorder("off"),
    )
    layer.latent, layer.bias = seen.latent, seen.bias
    pieces = []
    for start, stop in pairwise([0, *range(prompt, tokens, config.interval), tokens]):
        parts = (seen.query, seen.key, seen.value)
        query, key, value = (part[:, :, start:stop] for part in parts)
        how = (seen.scaling, seen.softcap, True, seen.sinks)
        out = layer.forward(query, key, value, None, *how)
        pieces.append(out[0].transpose(0, 1))
    return torch.cat(pieces)
