"""Attention with a bias by distance: what the model adds to logits, for any distance."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reasonalloc.attention.distance import DistanceBias
from reasonalloc.errors import UnsupportedError
from reasonalloc.planning.memory import LayerShape

_TABLE = "_reasonalloc_distances"


class DistanceTable:
    """Stands for ``forward`` of a module that makes a bias: for all distances, not for some keys.

    Args:
        module: makes a bias [batch, query_heads, q, n] of what it knows of the queries and either
            the positions of queries [q] and keys [n], or their distances [q, n].
        extent: distances that have a bias.
    """

    def __init__(self, module: Any, extent: int) -> None:
        self._forward = module.forward
        self._extent = extent
        self._given = "relative_distance" in inspect.signature(module.forward).parameters

    def __call__(self, states: Tensor, places: Tensor, others: Tensor) -> Tensor:
        """[batch, query_heads, q, extent]: the bias of distances 0, 1, ..."""
        every = torch.arange(self._extent, device=places.device)
        if self._given:  # distances, and positions of queries, which scale their bias
            where = (every.expand(places.shape[0], -1), others)
        else:
            where = (torch.zeros_like(places), -every)
        table: Tensor = self._forward(states, *where)
        return table


def distance_stands(
    model: Any, shapes: Sequence[LayerShape], attention: str
) -> list[tuple[Any, dict[str, Any]]]:
    """Return modules of the layers whose queries bring a bias by distance, and what to set on them.

    Args:
        model: a transformers model.
        shapes: its layers.
        attention: name of the backend.

    Raises:
        UnsupportedError: a module is not built as expected, or a backend that knows no such bias.
    """
    name = type(model).__name__
    stands: list[tuple[Any, dict[str, Any]]] = []
    wanted = {index: shape.distances for index, shape in enumerate(shapes) if shape.distances}
    if wanted and attention not in ("auto", "sdpa", "eager"):
        raise UnsupportedError(
            f"attention={attention!r} cannot run {name}, whose logits have a bias by distance: use "
            "attention='sdpa' or 'auto'"
        )
    for module in model.modules():
        extent = wanted.get(getattr(module, "layer_idx", -1), 0)
        parts = [part for part in module.children() if hasattr(part, "rel_extent")]
        if not extent or not parts:
            continue
        if len(parts) != 1 or parts[0].rel_extent != extent:
            raise UnsupportedError(
                f"{name} cannot run under a KV budget: its layer {module.layer_idx} has another "
                f"bias by distance than the configuration's of {extent} distances"
            )
        stands.append((parts[0], {"forward": DistanceTable(parts[0], extent)}))
        stands.append((module, {_TABLE: extent}))
        del wanted[module.layer_idx]
    if wanted:
        raise UnsupportedError(
            f"{name} cannot run under a KV budget: what adds a bias by distance in layer "
            f"{min(wanted)} was not found"
        )
    return stands


def added(module: Any, bias: Tensor, keys: int) -> Tensor:
    """What a layer that attends as usual adds to its logits, [batch, query_heads, q, keys].

    Args:
        module: of the attention.
        bias: as the module was given it: of all distances if ``DistanceTable`` made it.
        keys: their number; the last query stands at the last key.
    """
    extent = getattr(module, _TABLE, 0)
    if not extent:
        return bias
    places = torch.arange(keys, device=bias.device)
    distance = places[keys - bias.shape[2] :, None] - places
    return DistanceBias(extent).of(bias, distance).to(bias.dtype)
