from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from reasonalloc.errors import UsageError
from reasonalloc.policies.base import (
    POLICIES,
    Candidates,
    ModelFacts,
    Policy,
    from_mean_value,
    kept_state,
    of_rows,
)
from reasonalloc.policies.recent import add_received, weight_sums


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
    _metrics: Mapping[int, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

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
        add_received(state, received, (self.half_life,))

    def score(self, candidates: Candidates) -> Tensor:
        seen = (candidates.seen[:, None, None] - candidates.positions).clamp_min(1).float()
        attention = kept_state(candidates)[..., 0] / weight_sums(seen, self.half_life)
        away = from_mean_value(candidates)
        if self.metric == "output":
            layers = sorted(self._metrics)
            away = away @ of_rows(
                lambda index: self._root(index, away.device), layers, candidates.layer
            )
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
