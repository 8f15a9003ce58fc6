"""The interface of a head allocator, and what its members share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from reasonalloc.errors import UsageError
from reasonalloc.ops import TORCH, Operations
from reasonalloc.registry import Registry


@dataclass(frozen=True)
class HeadQuery:
    """What a head allocator may know of one layer at a boundary.

    Attributes:
        scores: [batch, kv_heads, n] float32, the policy's scores; -inf where no candidate stands.
        lengths: [batch, kv_heads] int64, tokens that each head holds now: the ceiling.
        total: [batch] int64, tokens that the layer may keep, at most ``lengths.sum(1)``.
        layer_total: the layer's budget, an upper bound of ``total``; [batch] int64 where rows are
            of several layers.
        least: [batch] int64, tokens that every head has to keep (window, sinks, prompt).
        window: always-kept recent tokens per head.
        shares: scores are shares of a head's own tokens (``Policy.sums_to_one``).
        planned: [kv_heads] int64, what the layer allocator gave each head beforehand, or [batch,
            kv_heads] where rows are of several layers, or None.
        ops: what ``pooled_counts`` and ``divide`` compute with.
        scored: [batch, kv_heads] int64, tokens of each head whose scores sum to one, if these are
            more than ``lengths``: pinned ones are scored and do not compete. Else None.
    """

    scores: Tensor
    lengths: Tensor
    total: Tensor
    layer_total: int | Tensor
    least: Tensor
    window: int
    shares: bool = False
    planned: Tensor | None = None
    ops: Operations = TORCH
    scored: Tensor | None = None

    def floor(self, share: float, margin: int) -> Tensor:
        """[batch, kv_heads] int64: ``max(share * mean, window + margin, least)``, made feasible."""
        heads = self.lengths.shape[1]
        mean = self.layer_total // heads
        if isinstance(mean, Tensor):
            share_ = (share * mean.double()).long()
            wanted = share_.clamp_min(self.window + margin).minimum(mean)
            floor = self.least.maximum(wanted)
        else:
            floor = self.least.clamp_min(min(max(int(share * mean), self.window + margin), mean))
        floor = floor.minimum(self.total // heads)
        return floor[:, None].minimum(self.lengths)

    def pooled_counts(self, score_norm: str) -> Tensor:
        """Count the candidates of each head among the layer's best: [batch, kv_heads] int64.

        ``score_norm="length"`` first multiplies scores that are shares of a head's own tokens by
        the head's number of candidates, which makes them comparable between heads; ``"standard"``
        gives the candidates of each head mean 0 and variance 1. See ``Operations.pooled_counts``.
        """
        if score_norm == "standard":
            scores = standardised(self.scores)
            return self.ops.pooled_counts(scores, self.lengths, self.total, self.window, False)
        scores, scaled = self.scores, score_norm == "length" and self.shares
        if scaled and self.scored is not None:
            scores, scaled = scores * (self.scored - self.window).clamp_min(1)[..., None], False
        return self.ops.pooled_counts(scores, self.lengths, self.total, self.window, scaled)

    def divide(self, demand: Tensor, lower: Tensor, exponent: float = 1.0) -> Tensor:
        """Divide the total in proportion to a demand: [batch, kv_heads] int64, sums exact.

        Args:
            demand: [batch, kv_heads], non-negative.
            lower: [batch, kv_heads] int64, what each head gets at least, see ``floor``.
            exponent: flattens the demand (below 1).
        """
        return self.ops.robustify(demand, self.total, lower, self.lengths, exponent)


SCORE_NORMS = ("paper", "length", "standard")


def standardised(scores: Tensor) -> Tensor:
    """Give the finite scores of each head mean 0 and variance 1, or 0 if they are all equal.

    In double precision, so that equal sets of scores stay equal whatever their order.

    Args:
        scores: [batch, kv_heads, n] float32; -inf where no candidate stands, inf of sinks.

    Returns:
        The same shape and dtype, infinite where it was.
    """
    there = scores.isfinite()
    count = there.sum(-1, keepdim=True).clamp_min(1)
    known = scores.double().masked_fill(~there, 0.0)
    centred = (known - known.sum(-1, keepdim=True) / count).masked_fill(~there, 0.0)
    spread = (centred.square().sum(-1, keepdim=True) / count).sqrt()
    # Equal scores leave rounding errors of their mean.
    flat = spread <= 1e-9 * known.abs().amax(-1, keepdim=True)
    scaled = (centred / spread.masked_fill(flat, 1.0)).masked_fill(flat, 0.0)
    return scaled.to(scores.dtype).where(there, scores)


def check_score_norm(owner: str, score_norm: str) -> None:
    """Refuse what is none of ``SCORE_NORMS``."""
    if score_norm not in SCORE_NORMS:
        known = ", ".join(map(repr, SCORE_NORMS))
        raise UsageError(f"{owner}: score_norm={score_norm!r} must be one of {known}")


class HeadAllocator(ABC):
    """Decides at every boundary how many tokens each KV head of a layer keeps."""

    equal: ClassVar[bool] = False
    """True if every head gets the same whenever the total divides evenly."""
    needs_plan: ClassVar[bool] = False
    """Ask for ``planned``: only with a layer allocator that plans heads too."""

    @abstractmethod
    def allocate(self, query: HeadQuery) -> Tensor:
        """[batch, kv_heads] int64: sums to ``total``, at most ``lengths``, without host syncs."""


HEAD_ALLOCATORS: Registry[HeadAllocator] = Registry(
    "head allocator",
    "reasonalloc.allocators.head",
    lambda: HeadAllocator,
    "reasonalloc.head_allocators",
)
"""Head allocators by name: the library's, those of packages and your own."""
