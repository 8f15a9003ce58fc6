"""Layers with a sliding window: transformers' own cache layers, shortened, copied, saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer


def shortened(layer: DynamicSlidingWindowLayer, columns: int) -> DynamicSlidingWindowLayer:
    """A sliding layer with its first ``columns``, all of which it still holds."""
    twin = DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
    if columns and layer.keys is not None and layer.values is not None:
        twin.lazy_initialization(layer.keys, layer.values)
        twin.keys, twin.values = (
            kept[:, :, :columns].clone() for kept in (layer.keys, layer.values)
        )
        twin.cumulative_length = columns
    return twin


def copied(
    layer: DynamicSlidingWindowLayer, sequences: Tensor | None = None
) -> DynamicSlidingWindowLayer:
    """The same content in memory of its own; see ``Slab.copy``."""
    twin = DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
    if layer.keys is not None and layer.values is not None:
        twin.lazy_initialization(layer.keys, layer.values)
        rows = slice(None) if sequences is None else sequences.to(layer.keys.device)
        twin.keys, twin.values = layer.keys[rows].clone(), layer.values[rows].clone()
        twin.cumulative_length = layer.cumulative_length
    return twin


def sliding_content(layer: DynamicSlidingWindowLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that a layer holds, as tensors by name and as numbers that JSON can hold."""
    held = {"keys": layer.keys, "values": layer.values}
    tensors = {name: tensor for name, tensor in held.items() if tensor is not None}
    return tensors, {"columns": layer.cumulative_length}


def filled_sliding(
    layer: DynamicSlidingWindowLayer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> DynamicSlidingWindowLayer:
    """A layer like an empty one, with what another held.

    Raises:
        ValueError, KeyError: something is missing or does not fit.
    """
    twin = DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
    columns = int(numbers["columns"])
    if tensors:
        keys, values = tensors["keys"], tensors["values"]
        held = min(columns, layer.sliding_window - 1)
        if keys.dim() != 4 or keys.shape[2] != held or keys.shape[:3] != values.shape[:3]:
            raise ValueError("the layers with a sliding window do not fit")
        twin.lazy_initialization(keys, values)
        twin.keys, twin.values = keys, values
        twin.cumulative_length = columns
    return twin
