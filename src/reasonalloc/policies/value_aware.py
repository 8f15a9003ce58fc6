from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from reasonalloc.errors import UsageError
from reasonalloc.policies.base import POLICIES, Candidates, ModelFacts, Policy, kept_state


@POLICIES.register("value_aware", source="ours; value norms as in VATP, arXiv 2406.12335")
@dataclass(frozen=True)
class ValueAware(Policy):
    """How much a head's output would move without a token: lately received attention x value.

    The attention is averaged over all queries since the token came, with weights that halve every
    ``half_life`` queries; the value counts by its distance from the mean value of the head's
    tokens, since attention that is lost falls to the others. ``metric="output"`` measures that
    distance behind the output projection (its mean square over the group's query heads) instead of
    before it. The first ``sinks`` tokens stay: heads look there when they have nothing to look for,
    which no average over the last queries foretells.
    """

    half_life: float = 32.0
    metric: str = "value"
    sinks: int = 4
    state_channels: ClassVar[int] = 1
    _roots: dict[tuple[int, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _metrics: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.half_life > 0:
            raise UsageError(
                f"value_aware: half_life={self.half_life} is a number of queries: give one above 0"
            )
        if self.metric not in ("value", "output"):
            raise UsageError(f"value_aware: metric={self.metric!r} must be 'value' or 'output'")
        if self.sinks < 0:
            raise UsageError(f"value_aware: sinks={self.sinks} must not be negative")

    def bind(self, model: ModelFacts) -> Policy:
        if self.metric == "value" or model.load_output_metrics is None:
            return self
        bound = dataclasses.replace(self)
        object.__setattr__(bound, "_metrics", model.load_output_metrics())
        return bound

    def observe(self, state: Tensor, received: Tensor, age: Tensor) -> None:
        # A query that is padding gives nothing to any token, and is not counted.
        total = received.sum(dim=-1, keepdim=True)
        if received.shape[-2] == 1:  # at every step: fewer operations
            still = 0.5 ** (1 / self.half_life)
            kept = torch.where(total > 0, still, torch.ones_like(total)).squeeze(-2)
            state[..., 0].mul_(kept).add_(received.squeeze(-2))
            return
        real = (total > 0).float()
        later = real.flip(-2).cumsum(-2).flip(-2) - real
        fading = 0.5 ** (later / self.half_life)
        kept = 0.5 ** (real.sum(dim=-2) / self.half_life)
        state[..., 0].mul_(kept).add_((received * fading).sum(dim=-2))

    def score(self, candidates: Candidates) -> Tensor:
        seen = candidates.seen[:, None, None] - candidates.positions
        one = 0.5 ** (1 / self.half_life)
        weights = (1 - 0.5 ** (seen.clamp_min(1).float() / self.half_life)) / (1 - one)
        attention = kept_state(candidates)[..., 0] / weights
        values = candidates.values.float()
        valid = candidates.valid[..., None]
        mean = (values * valid).sum(dim=2, keepdim=True) / valid.sum(dim=2, keepdim=True)
        away = values - mean
        if self.metric == "output":
            away = away @ self._root(candidates.layer, away.device)
        score: Tensor = attention * torch.linalg.vector_norm(away, dim=-1)
        return score.masked_fill(candidates.positions < self.sinks, torch.inf)

    def _root(self, layer: int, device: torch.device) -> Tensor:
        """[kv_heads, value_dim, value_dim] ``R`` with ``R R^T`` the layer's metric."""
        place = (layer, device)
        if place not in self._roots:
            if layer not in self._metrics:
                raise RuntimeError("value_aware(metric=output) must be bound to a model")
            sizes, directions = torch.linalg.eigh(self._metrics[layer].double())
            root = directions * sizes.clamp_min(0).sqrt()[:, None]
            self._roots[place] = root.float().to(device)
        return self._roots[place]
