"""What calibration learned to foretell: the loss that a token's absence will do to a KV head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reasonalloc.calibrated.reading import is_number
from reasonalloc.errors import UsageError

#: Queries after which attention that a token received counts half.
HALF_LIVES = (8.0, 128.0)
#: What is known of a token at a boundary, each as a logarithm; the last one is a constant.
FEATURES = (*(f"recent{life:g}" for life in HALF_LIVES), "age", "distance", "one")
_LARGEST = 1e30  # of a weight; sums of products with features stay finite in float32
_LEAST = 1e-6  # of an attention weight or a distance; keeps logarithms finite


@dataclass(frozen=True)
class Predictor:
    """Weights of ``log loss = sum_f weight_f * feature_f`` for every KV head under a budget.

    Attributes:
        layers: indices of the layers in the model, rising.
        weights: [layers][kv_heads][features], in the order of ``FEATURES``.
    """

    layers: list[int]
    weights: list[list[list[float]]]

    def of_layer(self, layer: int) -> Tensor:
        """[kv_heads, features] float32.

        Args:
            layer: index of the layer in the model.
        """
        rows = self.weights[self.layers.index(layer)]
        return torch.tensor(rows, dtype=torch.float32, device="cpu")

    def shard(self, rank: int, size: int) -> Predictor:
        """Weights of part ``rank`` of ``size`` equal parts of each layer's heads."""
        own = [layer[len(layer) // size * rank :][: len(layer) // size] for layer in self.weights]
        return Predictor(self.layers, own)


def features(recent: Sequence[Tensor], age: Tensor, distance: Tensor) -> Tensor:
    """Return what is known of tokens, [..., features] float32.

    Args:
        recent: per half-life [...], mean attention that a token received lately.
        age: [...], queries since it came, itself included, at least 1.
        distance: [...], of its value from the mean value of the head's tokens.
    """
    parts = [(each + _LEAST).log() for each in recent]
    parts += [age.log().expand_as(distance), distance.clamp_min(_LEAST).log()]
    parts.append(torch.ones_like(distance))
    return torch.stack(parts, dim=-1)


def read_predictor(data: Any, kv_heads: Sequence[int]) -> Predictor | None:
    """Return what a cost profile holds of it, checked; None if there is none.

    Args:
        data: the field's value.
        kv_heads: of each layer of the profile's costs.

    Raises:
        UsageError: it breaks the schema; says where.
    """
    if data is None:
        return None
    names = {"features", "layers", "weights"}
    if not isinstance(data, dict) or set(data) != names:
        raise UsageError(f"foretells must be null or an object with {', '.join(sorted(names))}")
    if data["features"] != list(FEATURES):
        raise UsageError(
            f"foretells: features={data['features']!r}, this version reads "
            f"{', '.join(FEATURES)}: calibrate again"
        )
    own = data["layers"]
    if (
        not isinstance(own, list)
        or len(own) != len(kv_heads)
        or not all(type(layer) is int and layer >= 0 for layer in own)
        or sorted(set(own)) != own
    ):
        raise UsageError(f"foretells: layers must be {len(kv_heads)} indices of layers, rising")
    weights = data["weights"]
    shape = f"foretells: weights must be [layers][kv_heads][{len(FEATURES)}], as costs are"
    if not isinstance(weights, list) or len(weights) != len(kv_heads):
        raise UsageError(shape)
    for layer, heads in zip(weights, kv_heads, strict=True):
        if not isinstance(layer, list) or len(layer) != heads:
            raise UsageError(shape)
        for head in layer:
            if not isinstance(head, list) or len(head) != len(FEATURES):
                raise UsageError(shape)
            if not all(is_number(weight) and abs(weight) <= _LARGEST for weight in head):
                raise UsageError(f"foretells: weights must be finite numbers up to {_LARGEST:g}")
    return Predictor(own, weights)


def as_json(predictor: Predictor | None) -> dict[str, Any] | None:
    """Return what ``read_predictor`` reads."""
    if predictor is None:
        return None
    return {
        "features": list(FEATURES),
        "layers": predictor.layers,
        "weights": predictor.weights,
    }
