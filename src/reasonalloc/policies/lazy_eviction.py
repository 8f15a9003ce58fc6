from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reasonalloc.errors import UsageError
from reasonalloc.policies.base import POLICIES, Candidates, Policy, kept_state


@POLICIES.register("lazy_eviction", source="LazyEviction, arXiv 2506.15969, per KV head")
@dataclass(frozen=True)
class LazyEviction(Policy):
    """Tokens that were attended to lately, measured by their longest break so far, stay.

    State: the token's age when it was last attended to, and its longest break (maximum recurrence
    interval), both in tokens. A new token counts as attended to at its own position.
    """

    threshold: float = 0.0005
    state_channels: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise UsageError(
                f"lazy_eviction: threshold={self.threshold} is the attention weight from which on "
                "a token counts as attended to: give 0 < threshold < 1"
            )

    def observe(self, state: Tensor, received: Tensor, age: Tensor) -> None:
        last, longest = state.unbind(dim=-1)
        hit = received >= self.threshold
        # Age at the latest hit up to each query: ages grow from query to query.
        ages = torch.cat([last.unsqueeze(-2), torch.where(hit, age, 0.0)], dim=-2)
        ages = ages.cummax(dim=-2).values
        breaks = (ages[..., 1:, :] - ages[..., :-1, :]).amax(dim=-2)
        longest.copy_(torch.maximum(longest, breaks))
        last.copy_(ages[..., -1, :])

    def score(self, candidates: Candidates) -> Tensor:
        last, longest = kept_state(candidates).unbind(dim=-1)
        age = candidates.seen[:, None, None] - 1 - candidates.positions
        interval = longest.clamp_min(1e-6)  # a token without a hit has the limits of the formulas
        return 2 * _sigmoid(-(age - last) / interval) + 2 * _sigmoid(-1 / interval)


def _sigmoid(x: Tensor) -> Tensor:
    """In float32, the same for equal numbers wherever they lie: many tokens have equal scores.

    PyTorch's own differs in the last digit between its vectors and what is left over.
    """
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    return torch.sigmoid(x.to(wide)).float()
