from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reasonalloc.policies.base import POLICIES, Candidates, Policy, causal, window_logits
from reasonalloc.sinks import softmax


@POLICIES.register("tova", source="TOVA, arXiv 2401.06104, per KV head")
@dataclass(frozen=True)
class Tova(Policy):
    """Attention of the last query, averaged over the query heads of the KV head's group."""

    needs_queries: ClassVar[bool] = True
    sums_to_one: ClassVar[bool] = True

    def score(self, candidates: Candidates) -> Tensor:
        logits = window_logits(candidates)
        logits = logits.masked_fill(~causal(candidates), torch.finfo(logits.dtype).min)
        own = candidates.query_sinks
        sinks = candidates.sinks if own is None else own[..., -1]
        return softmax(logits[:, :, :, -1], sinks).mean(dim=2)
