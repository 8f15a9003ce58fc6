from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from reasonalloc.errors import UsageError
from reasonalloc.policies.base import POLICIES, Candidates, Policy, check_kernel, window_logits
from reasonalloc.sinks import softmax

# Similarity is worked off in blocks of rows: 2 MiB in fp32 fit a CPU's cache, 32 MiB fill a GPU.
_CPU_BLOCK_ELEMENTS, _BLOCK_ELEMENTS = 1 << 19, 1 << 23


@POLICIES.register("rkv", source="R-KV, arXiv 2505.24133")
@dataclass(frozen=True)
class RKV(Policy):
    """Importance to the window's queries against redundancy among keys: lam * I - (1 - lam) * R."""

    lam: float = 0.1
    kernel: int = 7
    threshold: float = 0.5
    needs_queries: ClassVar[bool] = True
    sums_to_one: ClassVar[bool] = True
    loop: ClassVar[str | None] = "rkv"

    def __post_init__(self) -> None:
        check_kernel("rkv", self.kernel)
        if not 0 <= self.lam <= 1:
            raise UsageError(f"rkv: lam={self.lam} must lie between 0 and 1")
        if self.threshold < 0:
            raise UsageError(f"rkv: threshold={self.threshold} must not be negative")

    def score(self, candidates: Candidates) -> Tensor:
        importance = self._importance(candidates)
        redundancy = _redundancy(candidates.keys, candidates.valid, self.threshold)
        return self.lam * importance - (1 - self.lam) * redundancy

    def _importance(self, candidates: Candidates) -> Tensor:
        logits = window_logits(candidates).amax(dim=2)
        evictable = candidates.evictable
        logits = logits.masked_fill(~evictable[:, :, None], torch.finfo(logits.dtype).min)
        sinks = None if candidates.sinks is None else candidates.sinks.amax(dim=-1)
        if candidates.query_sinks is not None:
            sinks = candidates.query_sinks.amax(dim=2)
        weights = softmax(logits, sinks).mean(dim=2).masked_fill(~evictable, 0.0)
        return F.max_pool1d(weights, self.kernel, stride=1, padding=self.kernel // 2)


def _redundancy(keys: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Softmax over a head's keys of their mean cosine similarity to the others.

    In each row the latest similar key (cosine above ``threshold``) is not counted, so that the
    most recent of near-duplicates looks least redundant (R-KV, ``cal_similarity``).

    Args:
        keys: [batch, kv_heads, n, head_dim].
        valid: [batch, kv_heads, n] bool.

    Returns:
        [batch, kv_heads, n] float32.
    """
    batch, heads, n, _ = keys.shape
    norm = keys.float().norm(dim=-1)
    scale = (norm + 1e-8).reciprocal().masked_fill(~valid, 0.0)
    unit = keys.float() * scale[..., None]
    # A column's sum over all rows is one product with the sum of the rows; what does not count is
    # taken off again: the diagonal, and in each row the latest similar key.
    sums: Tensor = (unit * unit.sum(dim=2, keepdim=True)).sum(dim=-1) - (norm * scale).square()
    number = torch.arange(1, n + 1, device=keys.device, dtype=unit.dtype)  # exact up to 2**24
    elements = _CPU_BLOCK_ELEMENTS if keys.device.type == "cpu" else _BLOCK_ELEMENTS
    rows = max(1, elements // (batch * heads * n))
    for start in range(0, n, rows):
        part = unit[:, :, start : start + rows]
        cosine = (part @ unit.transpose(-1, -2)).float()  # autocast may have multiplied in halves
        cosine.diagonal(start, 2, 3).zero_()
        similar = cosine.clone().gt_(threshold)
        latest = similar.mul_(number).amax(dim=-1, keepdim=True).long() - 1  # -1: none
        column = latest.clamp_min(0)
        counted = cosine.gather(-1, column).masked_fill(latest < 0, 0.0)
        sums.scatter_add_(2, column.squeeze(-1), -counted.squeeze(-1))
    mean = sums / valid.sum(dim=-1, keepdim=True).clamp_min(1)
    return mean.masked_fill(~valid, torch.finfo(mean.dtype).min).softmax(dim=-1)
