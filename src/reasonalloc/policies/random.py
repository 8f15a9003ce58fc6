from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.policies.base import POLICIES, Candidates, Policy


def _wrap(value: int) -> int:
    """A 64-bit constant as a signed integer."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(z: Tensor) -> Tensor:
    """Finaliser of SplitMix64 on int64 (logical shifts by masking)."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _wrap(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _wrap(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@POLICIES.register("random", source="control; see arXiv 2609.03430")
@dataclass(frozen=True)
class Random(Policy):
    """Random scores, drawn anew at each boundary from (seed, layer, head, position, step).

    A hash, not a generator's state: a sequence gets the same draws alone and in any batch.
    """

    def score(self, candidates: Candidates) -> Tensor:
        heads = torch.arange(candidates.positions.shape[1], device=candidates.positions.device)
        golden = _wrap(0x9E3779B97F4A7C15)
        start = torch.full_like(candidates.seen, candidates.seed) * golden + candidates.layer
        key = _mix(_mix(start) + candidates.seen)[:, None] + heads
        bits = _mix(_mix(key)[..., None] + candidates.positions)
        return (bits & ((1 << 24) - 1)).float() / (1 << 24)
