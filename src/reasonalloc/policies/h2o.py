from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from reasonalloc.policies.base import POLICIES, Candidates, Policy


@POLICIES.register("h2o", source="H2O, arXiv 2306.14048, accumulated over every step")
@dataclass(frozen=True)
class H2O(Policy):
    """Attention received since the token came; half of the budget goes to the most recent."""

    needs_attention: ClassVar[bool] = True
    recent_fraction: ClassVar[float] = 0.5

    def score(self, candidates: Candidates) -> Tensor:
        if candidates.attention is None:
            raise RuntimeError("h2o needs the accumulated attention")
        return candidates.attention
