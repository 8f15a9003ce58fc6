"""One decision at a boundary: which tokens of a layer stay. Knows no storage and no engine."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonalloc.allocators.head import HeadAllocator, HeadQuery
from reasonalloc.config import CompressionConfig
from reasonalloc.core.contracts import check_budgets, check_scores
from reasonalloc.ops import TORCH, Operations
from reasonalloc.policies import Candidates, Policy
from reasonalloc.registry import is_builtin


def decide(
    candidates: Candidates,
    config: CompressionConfig,
    policy: Policy,
    heads: HeadAllocator,
    total: int,
    planned: Tensor | None,
    prompt: int | Tensor = 0,
    ops: Operations = TORCH,
) -> tuple[Tensor, Tensor]:
    """Score, allocate, select.

    Args:
        candidates: what the layer holds.
        config: window, sinks.
        policy, heads: which tokens, how many per head.
        total: tokens that the layer may keep, all its KV heads together.
        planned: [kv_heads] int64, what the layer allocator gave each head beforehand, or None.
        prompt: first tokens that must stay besides the sinks: one number, or [batch] int64.
        ops: what it is computed with.

    Returns:
        Tokens that stay, [batch, kv_heads, n] bool, and how many that are, [batch, kv_heads] int64.
    """
    forced = _forced(candidates, config.n_sink, prompt)
    scores = ops.score(policy, candidates)
    if not is_builtin(type(policy)):
        check_scores(policy, scores, candidates.positions.shape)
    scores = scores.float()
    scores = scores.clamp_min(torch.finfo(scores.dtype).min)
    if forced is not None:
        scores = scores.masked_fill(forced, torch.inf)
    scores = scores.masked_fill(~candidates.evictable, -torch.inf)
    lengths, window = candidates.lengths, config.window
    held = lengths.sum(dim=1)
    least = torch.full_like(held, window)
    if forced is not None:
        least = least + forced.sum(dim=-1).amax(dim=1)
    query = HeadQuery(
        scores,
        lengths,
        held.clamp_max(total),
        total,
        least,
        window,
        policy.sums_to_one,
        planned,
        ops,
    )
    budgets = heads.allocate(query)
    if not is_builtin(type(heads)):
        check_budgets(heads, budgets, query)
    keep = ops.select(scores, lengths, budgets, window, policy.recent_fraction, forced)
    return keep, budgets


def _forced(candidates: Candidates, n_sink: int, prompt: int | Tensor) -> Tensor | None:
    """[batch, kv_heads, n] bool: sinks and protected prompt among the evictable tokens."""
    first: int | Tensor
    if isinstance(prompt, Tensor):
        first = prompt.clamp_min(n_sink)[:, None, None]
    else:
        first = max(prompt, n_sink)
        if first == 0:
            return None
    return (candidates.positions < first) & candidates.evictable
