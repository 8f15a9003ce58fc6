"""What one layer's attention gives under a budget, when everything before it is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.attention import BACKENDS
from reasonalloc.compressor import LayerCompressor
from reasonalloc.config import CompressionConfig
from reasonalloc.policies import Policy
from reasonalloc.recorder import Recorder


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of one layer's attention over a whole text, from a pass with the full cache.

    Attributes:
        layer: index of the layer in the model.
        query: [1, query_heads, tokens, head_dim] after RoPE.
        key: [1, kv_heads, tokens, head_dim] after RoPE.
        value: [1, kv_heads, tokens, value_dim].
        scaling, softcap: of the attention logits.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None


def outputs_under_budgets(
    inputs: LayerInputs,
    prompt: int,
    config: CompressionConfig,
    policy: Policy,
    budgets: Sequence[int],
) -> list[Tensor]:
    """Attention outputs of a layer, each head held to the same number of tokens.

    The text goes through ``LayerCompressor`` as in decoding: the prompt, a boundary, then
    ``interval`` tokens at a time. Heads with equal budgets do not influence one another, so every
    head's output is that of compressing it alone.

    Args:
        inputs: what the layer saw.
        prompt: tokens of the text that are the prompt.
        config: cadence and options; its budget and arm are not looked at.
        policy: which tokens, bound to the model.
        budgets: tokens per head, each at least window and sinks.

    Returns:
        One tensor [tokens, query_heads, value_dim] per budget.
    """
    tokens = inputs.key.shape[2]
    found = []
    for budget in budgets:
        layer = LayerCompressor(
            inputs.layer,
            budget * inputs.key.shape[1],
            replace(config, budget=budget, record="off"),
            policy,
            HEAD_ALLOCATORS.create("uniform"),
            BACKENDS.create("eager"),
            Recorder("off"),
        )
        pieces = []
        edges = [0, *range(prompt, tokens, config.interval), tokens]
        with torch.no_grad():
            for start, stop in pairwise(edges):
                parts = (inputs.query, inputs.key, inputs.value)
                query, key, value = (part[:, :, start:stop] for part in parts)
                out = layer.forward(
                    query, key, value, None, inputs.scaling, inputs.softcap, replay=True
                )
                pieces.append(out[0].transpose(0, 1))
        found.append(torch.cat(pieces))
    return found
