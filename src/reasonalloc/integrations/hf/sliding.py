"""Layers with a sliding window: transformers' own cache layers, shortened, copied, saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from reasonalloc.core.recorder import Recorder
from reasonalloc.errors import UnsupportedError
from reasonalloc.planning.memory import LayerShape

_Own = TypeVar("_Own", bound="SlidingLayer")


class SlidingLayer(DynamicSlidingWindowLayer):
    """A layer with a sliding window or chunks, as in transformers, of the planned bytes.

    Args:
        shape: what the model's configuration says of the layer.
    """

    def __init__(self, shape: LayerShape) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window=shape.sliding_window or 0)
        self.shape = shape

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Check the shapes, [batch, kv_heads, q, head_dim].

        Raises:
            UnsupportedError: they differ from the plan.
        """
        check_width("a layer with a sliding window", self.shape, key_states, value_states)
        DynamicSlidingWindowLayer.lazy_initialization(self, key_states, value_states)

    def shortened(self: _Own, columns: int) -> _Own:
        """A layer with the first ``columns``, all of which this one still holds; without states."""
        twin = type(self)(self.shape)
        if columns and self.keys is not None and self.values is not None:
            twin.lazy_initialization(self.keys, self.values)
            twin.keys, twin.values = (
                kept[:, :, :columns].clone() for kept in (self.keys, self.values)
            )
            twin.cumulative_length = columns
        return twin

    def copy(self: _Own, recorder: Recorder, sequences: Tensor | None = None) -> _Own:
        """The same content in memory of its own; see ``Slab.copy``."""
        twin = type(self)(self.shape)
        if self.keys is not None and self.values is not None:
            twin.lazy_initialization(self.keys, self.values)
            rows = slice(None) if sequences is None else sequences.to(self.keys.device)
            twin.keys, twin.values = self.keys[rows].clone(), self.values[rows].clone()
            twin.cumulative_length = self.cumulative_length
        return twin

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that it holds, as tensors by name and as numbers that JSON can hold."""
        held = {"keys": self.keys, "values": self.values}
        tensors = {name: tensor for name, tensor in held.items() if tensor is not None}
        return tensors, {"columns": self.cumulative_length}

    def fill(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take over what another layer held, while this one is empty.

        Raises:
            ValueError, KeyError: something is missing or does not fit.
        """
        columns = int(numbers["columns"])
        if tensors:
            keys, values = tensors["keys"], tensors["values"]
            held = min(columns, self.sliding_window - 1)
            if keys.dim() != 4 or keys.shape[2] != held or keys.shape[:3] != values.shape[:3]:
                raise ValueError("the layers with a sliding window do not fit")
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values
            self.cumulative_length = columns


def check_width(what: str, shape: LayerShape, key: Tensor, value: Tensor) -> None:
    """Refuse keys and values, [batch, heads, q, width], of other sizes than planned.

    Raises:
        UnsupportedError: says which.
    """
    found = tuple((x.shape[1], x.shape[3]) for x in (key, value))
    for part, own, planned in zip(("keys", "values"), found, shape.handed, strict=True):
        if own != planned:
            raise UnsupportedError(
                f"{what} has {part} of {own[0]} KV heads of width {own[1]}, but the model's "
                f"configuration says {planned[0]} of {planned[1]}: its memory cannot be planned"
            )
