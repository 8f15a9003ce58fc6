"""Random calibrated statistics, and policies that are ready to score."""

from __future__ import annotations

from typing import Any

import torch

import made_costs
from reasonalloc.calibrated.demand import config_hash
from reasonalloc.calibrated.statistics import Statistics
from reasonalloc.integrations.hf.model import check_model
from reasonalloc.integrations.hf.rope import read_rope
from reasonalloc.planning.shapes import text_config
from reasonalloc.policies import POLICIES, Policy
from reasonalloc.policies.predicted_loss import PredictedLoss
from reasonalloc.policies.tri_attention import TriAttention
from reasonalloc.rotary import Rope


def make(
    layers: list[int], query_heads: int, rope: Rope, *, fingerprint: str = "", seed: int = 0
) -> Statistics:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(layers), query_heads, rope.features)
    mean = torch.complex(*(torch.randn(shape, generator=generator) for _ in range(2)))
    mean[..., rope.pairs :] = mean[..., rope.pairs :].real + 0j
    shares = torch.rand(6, len(layers), generator=generator).double() + 0.05
    return Statistics(
        model_id="tiny",
        config_hash=fingerprint,
        steps=512,
        window=8,
        prompt_hashes=["a" * 64],
        layers=layers,
        entropy=torch.rand(len(layers), generator=generator).double() * 100,
        variance=torch.rand(len(layers), generator=generator).double() * 1e-3,
        tops=[1, 2, 4, 8, 16, 32],
        top_share=shares / shares.sum(dim=1, keepdim=True),
        rope=rope,
        query_mean=mean,
        query_norm=mean.abs() + torch.rand(shape, generator=generator),
    )


def of_model(model: Any, seed: int = 0) -> Statistics:
    shapes = check_model(model)
    layers = [i for i, shape in enumerate(shapes) if shape.compressible]
    fingerprint = config_hash(text_config(model).to_dict())
    rope = read_rope(model)
    return make(layers, shapes[0].query_heads, rope, fingerprint=fingerprint, seed=seed)


def ready(spec: str, layer: int, query_heads: int, head_dim: int, kv_heads: int = 3) -> Policy:
    """A policy that has whatever it reads; a quarter of the width is not rotated."""
    policy = POLICIES.create(spec)
    if isinstance(policy, TriAttention):
        pairs = head_dim * 3 // 8
        rope = Rope(tuple(0.5**i for i in range(pairs)), 1.0, head_dim)
        return policy.with_statistics(make([layer - 1, layer], query_heads, rope))
    if isinstance(policy, PredictedLoss):
        return policy.with_predictor(made_costs.predictor([layer - 1, layer], kv_heads))
    return policy
