from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from reasonalloc.calibrated.costs import load_costs
from reasonalloc.calibrated.predictor import HALF_LIVES, Predictor, features
from reasonalloc.calibrated.reader import ReadsCalibrated
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


@POLICIES.register("predicted_loss", source="ours: fitted to Fisher gradients of known texts")
@dataclass(frozen=True)
class PredictedLoss(ReadsCalibrated, Policy):
    """What a token's absence will cost, as calibration learned to foretell it for each KV head.

    A product of powers of what is known of the token: the attention it received, averaged with
    two half-lives, its age, and the distance of its value from the mean value of the head's
    tokens. The exponents come from a cost profile. The first ``sinks`` tokens stay.
    """

    sinks: int = 4
    reads = "cost profile"
    state_channels: ClassVar[int] = len(HALF_LIVES)
    _predictor: Predictor | None = field(default=None, init=False, repr=False, compare=False)
    _weights: dict[tuple[int, torch.device], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise UsageError(f"predicted_loss: sinks={self.sinks} must not be negative")

    def bind(self, model: ModelFacts) -> Policy:
        if not self.path:
            raise UsageError(
                "policy='predicted_loss' needs a cost profile: pass profile='FILE.json' "
                "(--profile FILE.json), made for this model with "
                "'reasonalloc calibrate --objective fisher --policy predicted_loss'"
            )
        costs = load_costs(self.path)
        costs.check_model(model.model_id, model.config_hash, model.kv_heads)
        predictor = costs.predictor
        if predictor is None:
            raise UsageError(
                f"policy='predicted_loss': the cost profile {self.path!r} was made with "
                f"{costs.policy} and foretells nothing: calibrate with --policy predicted_loss"
            )
        if predictor.layers != list(model.indices):
            raise UsageError(
                f"policy='predicted_loss': the cost profile {self.path!r} foretells losses of "
                f"layers {predictor.layers}, but {model.model_id!r} has a budget in layers "
                f"{list(model.indices)}: calibrate this model"
            )
        return self.with_predictor(predictor)

    def with_predictor(self, predictor: Predictor) -> PredictedLoss:
        """The policy ready to score, with weights that fit the model."""
        bound = dataclasses.replace(self)
        object.__setattr__(bound, "_predictor", predictor)
        return bound

    def shard(self, rank: int, size: int) -> Policy:
        if self._predictor is None:
            raise RuntimeError("predicted_loss must be bound to a model")
        return self.with_predictor(self._predictor.shard(rank, size))

    def observe(self, state: Tensor, received: Tensor, age: Tensor) -> None:
        add_received(state, received, HALF_LIVES)

    def score(self, candidates: Candidates) -> Tensor:
        state = kept_state(candidates)
        seen = (candidates.seen[:, None, None] - candidates.positions).clamp_min(1).float()
        recent = [
            state[..., channel] / weight_sums(seen, half_life)
            for channel, half_life in enumerate(HALF_LIVES)
        ]
        distance = torch.linalg.vector_norm(from_mean_value(candidates), dim=-1)
        known = features(recent, seen, distance)
        weights = self._of_rows(candidates.layer, known)
        score = (known * weights[:, :, None]).sum(dim=-1)
        return score.masked_fill(candidates.positions < self.sinks, torch.inf)

    def _of_rows(self, layer: int | Tensor, known: Tensor) -> Tensor:
        """[1 or batch, kv_heads, features], see ``Candidates.layer``."""
        if self._predictor is None:
            raise RuntimeError("predicted_loss must be bound to a model")
        return of_rows(lambda index: self._of_layer(index, known), self._predictor.layers, layer)

    def _of_layer(self, layer: int, known: Tensor) -> Tensor:
        """[kv_heads, features] on a device; copied there once, since a copy may wait for it."""
        place = (layer, known.device)
        if place not in self._weights:
            if self._predictor is None:
                raise RuntimeError("predicted_loss must be bound to a model")
            weights = self._predictor.of_layer(layer)
            if weights.shape[0] != known.shape[1]:
                raise UsageError(
                    f"policy='predicted_loss': the cost profile is of {weights.shape[0]} KV heads "
                    f"per layer, layer {layer} has {known.shape[1]}: calibrate this model"
                )
            self._weights[place] = weights.to(known.device)
        return self._weights[place]
