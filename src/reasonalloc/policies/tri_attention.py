from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from reasonalloc.calibrated.reader import ReadsCalibrated
from reasonalloc.calibrated.statistics import Statistics, load_statistics
from reasonalloc.errors import UsageError
from reasonalloc.policies.base import POLICIES, Candidates, ModelFacts, Policy, of_rows
from reasonalloc.rotary import Rope, from_features, to_features, turns


class _Layer(NamedTuple):
    """Query statistics of a layer on its device.

    Attributes:
        mean: [kv_heads, group, features] complex64, mean query at position 0, averaged over the
            future as well.
        spread: [kv_heads, group, features] float32, mean of the absolute values, less that of the
            mean.
        rates: [features] float64, angle per position.
    """

    mean: Tensor
    spread: Tensor
    rates: Tensor


@POLICIES.register("tri_attention", source="TriAttention, arXiv 2604.04921, per KV head")
@dataclass(frozen=True)
class TriAttention(ReadsCalibrated, Policy):
    """Attention that a model's average queries would give from geometric distances in the future.

    Per query head ``sum_f |q_f||k_f| cos(w_f d + phi_f) + (E|q_f| - |q_f|)|k_f|`` over the features
    ``f`` of mean query and key, averaged over the distances; standardised over a head's candidates;
    maximum over the group.
    """

    horizon: int = 65536
    reads = "statistics"
    _statistics: Statistics | None = field(default=None, init=False, repr=False, compare=False)
    _layers: dict[tuple[int, torch.device], _Layer] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise UsageError(
                f"tri_attention: horizon={self.horizon} is the farthest future query, in tokens: "
                "give at least 1"
            )

    def bind(self, model: ModelFacts) -> Policy:
        if not self.path:
            raise UsageError(
                "policy='tri_attention' needs a statistics file: pass profile='FILE.safetensors' "
                "(--profile FILE.safetensors), made for this model with "
                "'reasonalloc calibrate --objective statistics'"
            )
        statistics = load_statistics(self.path)
        statistics.check_model(model.model_id, model.config_hash, model.layers)
        rope, queries = statistics.rope, statistics.query_mean
        if rope is None or queries is None:
            raise UsageError(f"statistics {self.path!r} hold no queries: {statistics.no_queries}")
        if queries.shape[1] != model.query_heads or rope.head_dim != model.head_dim:
            raise UsageError(
                f"statistics {self.path!r} are of {queries.shape[1]} query heads of width "
                f"{rope.head_dim}, but {model.model_id!r} has {model.query_heads} of "
                f"{model.head_dim}: calibrate this model"
            )
        if model.load_rope is not None and not _same(rope, model.load_rope()):
            raise UsageError(
                f"statistics {self.path!r} were made with another rotary embedding than "
                f"{model.model_id!r} has: calibrate this model as it is"
            )
        return self.with_statistics(statistics)

    def with_statistics(self, statistics: Statistics) -> TriAttention:
        """The policy ready to score, with statistics that fit the model."""
        bound = dataclasses.replace(self)
        object.__setattr__(bound, "_statistics", statistics)
        return bound

    def shard(self, rank: int, size: int) -> Policy:
        if self._statistics is None:
            raise RuntimeError("tri_attention must be bound to a model")
        return self.with_statistics(self._statistics.shard(rank, size))

    def score(self, candidates: Candidates) -> Tensor:
        statistics = self._statistics
        if statistics is None or statistics.rope is None:
            raise RuntimeError("tri_attention must be bound to a model")
        rope, keys = statistics.rope, candidates.keys.float()
        # Keys are rotated already: rotating the mean query to where it will be asked gives the
        # cosines of all distances at once, and their average over the future is one vector.
        indices, layer = statistics.layers, candidates.layer
        mean = of_rows(lambda index: self._layer(statistics, index, keys).mean, indices, layer)
        spread = of_rows(lambda index: self._layer(statistics, index, keys).spread, indices, layer)
        rates = self._layer(statistics, statistics.layers[0], keys).rates
        turn = turns(candidates.seen - 1, rates).to(torch.complex64)
        query = from_features(mean * turn[:, None, None], rope.pairs)
        sizes = to_features(keys, rope.pairs).abs()
        scores = query @ keys.transpose(-1, -2) + spread @ sizes.transpose(-1, -2)
        return _standardised(scores, candidates.evictable[:, :, None]).amax(dim=2)

    def _layer(self, statistics: Statistics, layer: int, keys: Tensor) -> _Layer:
        """Copied to a device once, since a copy may wait for it."""
        place = (layer, keys.device)
        if place not in self._layers:
            rope, means, norms = statistics.rope, statistics.query_mean, statistics.query_norm
            if rope is None or means is None or norms is None:
                raise RuntimeError("statistics without queries")
            row = statistics.layers.index(layer)
            powers = [1 << power for power in range(self.horizon.bit_length())]
            offsets = torch.tensor(powers, dtype=torch.int64, device=means.device)
            rates = rope.rates(means.device)
            future = turns(offsets, rates).mean(dim=0).to(torch.complex64)
            spread = (norms[row] - means[row].abs()).clamp_min(0)
            shape = (keys.shape[1], -1, rope.features)
            self._layers[place] = _Layer(
                (means[row] * future).to(keys.device).view(shape),
                spread.to(keys.device).view(shape),
                rates.to(keys.device),
            )
        return self._layers[place]


def _same(one: Rope, other: Rope) -> bool:
    if one.pairs != other.pairs or one.head_dim != other.head_dim:
        return False
    pairs = zip((*one.frequencies, one.scaling), (*other.frequencies, other.scaling), strict=True)
    return all(abs(a - b) <= 1e-5 * abs(a) for a, b in pairs)


def _standardised(scores: Tensor, among: Tensor) -> Tensor:
    """Zero mean and unit variance along the last dimension, over the entries ``among``."""
    count = among.sum(dim=-1, keepdim=True).clamp_min(1)
    centred = scores - scores.masked_fill(~among, 0.0).sum(dim=-1, keepdim=True) / count
    square = centred.square().masked_fill(~among, 0.0).sum(dim=-1, keepdim=True) / count
    return centred / square.sqrt().clamp_min(1e-6)
