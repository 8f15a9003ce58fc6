from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from reasonalloc.errors import UsageError
from reasonalloc.policies.base import (
    POLICIES,
    Candidates,
    Policy,
    causal,
    check_kernel,
    window_logits,
    window_sinks,
)
from reasonalloc.sinks import softmax


@POLICIES.register("snapkv", source="SnapKV, arXiv 2404.14469, per KV head")
@dataclass(frozen=True)
class SnapKV(Policy):
    """Attention of the window's queries: group mean, sum over queries, pooled over neighbours."""

    kernel: int = 5
    pooling: str = "avg"
    needs_queries: ClassVar[bool] = True
    sums_to_one: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_kernel("snapkv", self.kernel)
        if self.pooling not in ("avg", "max"):
            raise UsageError(f"snapkv: pooling={self.pooling!r} must be 'avg' or 'max'")

    def score(self, candidates: Candidates) -> Tensor:
        logits = window_logits(candidates)
        logits = logits.masked_fill(~causal(candidates), torch.finfo(logits.dtype).min)
        weights = softmax(logits, window_sinks(candidates)).mean(dim=2).sum(dim=2)
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        weights = weights.masked_fill(~candidates.evictable, 0.0)
        return pool(weights, self.kernel, stride=1, padding=self.kernel // 2)
