"""One decision at a boundary: which tokens of a layer stay. Knows no storage and no engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.allocators.head import HeadAllocator, HeadQuery
from reasonalloc.config import CompressionConfig
from reasonalloc.core.contracts import check_budgets, check_scores
from reasonalloc.core.pinned import Pinned
from reasonalloc.ops import TORCH, Operations
from reasonalloc.policies import Candidates, Policy
from reasonalloc.registry import is_builtin


def decide(
    candidates: Candidates,
    config: CompressionConfig,
    policy: Policy,
    heads: HeadAllocator,
    total: int | Tensor,
    planned: Tensor | None,
    prompt: int | Tensor = 0,
    ops: Operations = TORCH,
    pinned: Pinned | None = None,
    capped: bool = False,
) -> tuple[Tensor, Tensor]:
    """Score, allocate, select.

    Policies score everything that the layer holds. What is pinned stays; the others compete for
    the total among themselves.

    Args:
        candidates: what the layer holds.
        config: window, sinks.
        policy, heads: which tokens, how many per head.
        total: tokens that the layer may keep, all its KV heads together: one number, or [batch]
            int64 where rows are of several layers.
        planned: [kv_heads] int64, what the layer allocator gave each head beforehand, or [batch,
            kv_heads] where rows are of several layers, or None.
        prompt: first tokens that must stay besides the sinks: one number, or [batch] int64.
        ops: what it is computed with.
        pinned: tokens that stay on top of the total, or None.
        capped: every head keeps what was planned for it and no more; ``heads`` is not asked.

    Returns:
        Tokens that stay, [batch, kv_heads, n] bool, and how many that are, [batch, kv_heads] int64.
    """
    scores = ops.score(policy, candidates)
    if not is_builtin(type(policy)):
        check_scores(policy, scores, candidates.positions.shape)
    scores = scores.float()
    scores = scores.clamp_min(torch.finfo(scores.dtype).min)
    apart = _Competing.of(candidates, pinned)
    lengths, window = apart.lengths, config.window
    scores, positions = apart.of_all(scores), apart.of_all(candidates.positions)
    index = torch.arange(scores.shape[-1], device=scores.device)
    evictable = index < (lengths - window)[..., None]
    forced = _forced(positions, evictable, config.n_sink, prompt)
    if forced is not None:
        scores = scores.masked_fill(forced, torch.inf)
    scores = scores.masked_fill(~evictable, -torch.inf)
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
        candidates.lengths if pinned else None,
    )
    if capped and planned is not None:
        budgets = planned.expand_as(lengths).minimum(lengths)
    else:
        budgets = heads.allocate(query)
    if not is_builtin(type(heads)):
        check_budgets(heads, budgets, query)
    keep = ops.select(scores, lengths, budgets, window, policy.recent_fraction, forced)
    return apart.with_pinned(keep), budgets + (candidates.lengths - lengths)


@dataclass
class _Competing:
    """The tokens that are not pinned, left-aligned.

    Attributes:
        lengths: [batch, kv_heads] int64, how many.
        first: number of pinned tokens before them, if that is all and the same everywhere.
        order: [batch, kv_heads, n] int64, where they are, then everything else; or ``first``.
        pinned: [batch, kv_heads, n] bool, or None.
    """

    lengths: Tensor
    first: int = 0
    order: Tensor | None = None
    pinned: Tensor | None = None

    @classmethod
    def of(cls, candidates: Candidates, pinned: Pinned | None) -> _Competing:
        """Sort the tokens of a layer."""
        lengths = candidates.lengths
        if not pinned:
            return cls(lengths)
        if (first := pinned.prefix) is not None:
            return cls(lengths - first, first)
        n = candidates.positions.shape[-1]
        held = torch.arange(n, device=lengths.device) < lengths[..., None]
        stays = pinned.mask(candidates.positions) & held
        order = stays.to(torch.int8).argsort(dim=-1, stable=True)
        return cls(lengths - stays.sum(dim=-1), order=order, pinned=stays)

    def of_all(self, values: Tensor) -> Tensor:
        """Return the entries of [batch, kv_heads, n] that compete, then anything."""
        if self.order is None:
            return values[..., self.first :].contiguous()
        return values.gather(-1, self.order)

    def with_pinned(self, keep: Tensor) -> Tensor:
        """Return what stays of everything, [batch, kv_heads, n] bool, of what stays of those."""
        if self.order is None or self.pinned is None:
            if self.first == 0:
                return keep
            pinned = keep.new_ones(*keep.shape[:-1], self.first)
            return torch.cat([pinned, keep], dim=-1)
        return torch.zeros_like(keep).scatter_(-1, self.order, keep) | self.pinned


def _forced(
    positions: Tensor, evictable: Tensor, n_sink: int, prompt: int | Tensor
) -> Tensor | None:
    """[batch, kv_heads, n] bool: sinks and protected prompt among the evictable tokens."""
    first: int | Tensor
    if isinstance(prompt, Tensor):
        first = prompt.clamp_min(n_sink)[:, None, None]
    else:
        first = max(prompt, n_sink)
        if first == 0:
            return None
    return (positions < first) & evictable
