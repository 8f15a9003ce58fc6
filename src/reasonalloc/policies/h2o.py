from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from reasonalloc.policies.base import POLICIES, Candidates, Policy, kept_state


@POLICIES.register("h2o", source="H2O, arXiv 2306.14048, accumulated over every step")
@dataclass(frozen=True)
class H2O(Policy):
    """Attention received since the token came; half of the budget goes to the most recent."""

    state_channels: ClassVar[int] = 1
    recent_fraction: ClassVar[float] = 0.5

    def observe(self, state: Tensor, received: Tensor, age: Tensor) -> None:
        state[..., 0] += received.sum(dim=-2)

    def score(self, candidates: Candidates) -> Tensor:
        return kept_state(candidates)[..., 0]
