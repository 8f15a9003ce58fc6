"""The layers of a ``BudgetCache``: which kinds there are, and what they hold together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.recorder import Recorder
from reasonalloc.integrations.hf.images import ImageLayer
from reasonalloc.integrations.hf.latent import LatentLayer
from reasonalloc.integrations.hf.paired import PairedLayer
from reasonalloc.integrations.hf.slab_layer import SlabLayer
from reasonalloc.integrations.hf.sliding import SlidingLayer
from reasonalloc.integrations.hf.states import (
    SlabAndStateLayer,
    SlidingAndStateLayer,
    StateLayer,
    empty_layer,
)
from reasonalloc.planning.memory import LayerShape

#: Layers that can copy what they hold, and give and take it; the others hold nothing.
_HOLDING = (SlabLayer, SlidingLayer, StateLayer, ImageLayer)


def held_bytes(layers: Iterable[Any]) -> int:
    """Bytes that cache layers of transformers' own hold for keys, values and states."""
    size = 0
    for layer in layers:
        held = [getattr(layer, name, None) for name in ("keys", "values")]
        for name in ("conv_states", "recurrent_states"):
            held.extend(getattr(layer, name, {}).values())
        size += sum(tensor.nbytes for tensor in held if tensor is not None)
    return size


def _layer(compressor: LayerCompressor | None, shape: LayerShape) -> Any:
    """An empty cache layer of what the model's configuration says."""
    if compressor is not None:
        if shape.latent is not None and shape.latent.cached:
            return LatentLayer(compressor, shape)
        if shape.paired:
            return PairedLayer(compressor, shape)
        if shape.state is None:
            return SlabLayer(compressor, shape)
        return SlabAndStateLayer(compressor, shape)
    if shape.sliding_window is not None:
        return SlidingLayer(shape) if shape.state is None else SlidingAndStateLayer(shape)
    if shape.image:
        return ImageLayer()
    return empty_layer() if shape.state is None else StateLayer(shape.state)


class CacheLayers(list[Any]):
    """All layers of a cache, in the model's order; see ``layers_of``.

    Args:
        layers: one per layer of the model, empty or not.
        first: the first one with keys.
        counted: whether keys hold where they stand (ALiBi).
    """

    def __init__(self, layers: Iterable[Any], first: int, counted: bool) -> None:
        super().__init__(layers)
        self.first, self.counted = first, counted
        #: Those under a budget.
        self.budgeted = [layer for layer in self if isinstance(layer, SlabLayer)]

    @property
    def sliding(self) -> list[SlidingLayer]:
        """Those with a sliding window."""
        return [layer for layer in self if isinstance(layer, SlidingLayer)]

    @property
    def images(self) -> list[ImageLayer]:
        """Those that hold images."""
        return [layer for layer in self if isinstance(layer, ImageLayer)]

    @property
    def states(self) -> list[StateLayer]:
        """Those with a state (linear attention, Mamba, convolution)."""
        return [layer for layer in self if isinstance(layer, StateLayer)]

    @property
    def linear(self) -> list[bool]:
        """Per layer whether it has a state and no attention."""
        return [
            isinstance(layer, LinearAttentionCacheLayerMixin)
            and not isinstance(layer, CacheLayerMixin)
            for layer in self
        ]

    def in_step(self, length: int) -> bool:
        """Whether all layers with keys have seen ``length`` tokens, and none is in the middle."""
        return all(
            layer.get_seq_length() == length and not (isinstance(layer, SlabLayer) and layer.midway)
            for layer in (*self.budgeted, *self.sliding)
        )

    @property
    def batch(self) -> int | None:
        """Sequences; None before the first token."""
        slab = self.budgeted[0].compressor.slab
        return None if slab is None else slab.batch

    @property
    def evicted_at(self) -> int:
        """Columns of the text at the latest compression; 0 if there was none."""
        return max(layer.compressor.evicted_at for layer in self.budgeted)

    def reach(self, columns: int) -> int | None:
        """As ``BudgetCache.reach``."""
        if columns < self.evicted_at:
            return None
        if any(columns < layer.compressor.protected_columns for layer in self.budgeted):
            return None if self.evicted_at else 0  # the new prompt is to be protected as a whole
        if any(layer.filled for layer in self.images):
            return None  # the next call may not bring the image again
        bounded = any(layer.get_seq_length() >= layer.sliding_window for layer in self.sliding)
        bounded = bounded or bool(self.states)
        if bounded or any(layer.compressor.keeps_state for layer in self.budgeted):
            return None if self.evicted_at else 0
        return columns

    def clear(self) -> None:
        """Forget everything; the memory of slabs stays, and so do the layers themselves."""
        for budgeted in self.budgeted:
            budgeted.clear()
        for state in self.states:
            state.clear_states()
        for image in self.images:
            image.forget()

    def shorten_windows(self, columns: int) -> None:
        """Have layers with a sliding window forget everything behind the first ``columns``."""
        for index, layer in enumerate(self):
            if isinstance(layer, SlidingLayer):
                self[index] = layer.shortened(columns)

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What all of them hold, as tensors by name and as numbers that JSON can hold."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {}
        for index, layer in enumerate(self):
            if isinstance(layer, _HOLDING):
                own, numbers[str(index)] = layer.content()
                tensors |= {f"{index}.{name}": tensor for name, tensor in own.items()}
        return tensors, numbers

    def fill(
        self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], device: torch.device
    ) -> None:
        """Take over what others held, see ``content``.

        Raises:
            ValueError, KeyError, TypeError: something is missing or does not fit.
        """
        for index, layer in enumerate(self):
            start = f"{index}."
            own = {
                name.removeprefix(start): tensor.to(device)
                for name, tensor in tensors.items()
                if name.startswith(start)
            }
            if isinstance(layer, _HOLDING):
                layer.fill(own, numbers[str(index)])

    def copied(self, recorder: Recorder, sequences: Tensor | None) -> CacheLayers:
        """The same layers with the same content, in memory of their own.

        Args:
            recorder: takes note of their compressions.
            sequences: [n] int64, which of the sequences, in this order; None: all.
        """
        copies = (
            layer.copy(recorder, sequences) if isinstance(layer, _HOLDING) else empty_layer()
            for layer in self
        )
        return CacheLayers(copies, self.first, self.counted)

    @contextmanager
    def static(self) -> Iterator[None]:
        """Inside, a decode step does the device's part alone."""
        for layer in self.budgeted:
            layer.compressor.static = True
        try:
            yield
        finally:
            for layer in self.budgeted:
                layer.compressor.static = False

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Inside, several new tokens are as many decode steps at once, with the same result."""
        for layer in self.budgeted:
            layer.replay = True
        try:
            yield
        finally:
            for layer in self.budgeted:
                layer.replay = False

    @property
    def other_bytes(self) -> int:
        """Bytes of the layers with a sliding window, of images and of states."""
        bounded = [t for s in (*self.sliding, *self.images) for t in (s.keys, s.values)]
        size = sum(tensor.nbytes for tensor in bounded if tensor is not None)
        return size + sum(layer.state_bytes for layer in self.states)

    @property
    def kv_bytes(self) -> int:
        """As ``BudgetCache.kv_bytes``."""
        slabs = [layer.compressor.slab for layer in self.budgeted]
        return sum(slab.kv_bytes for slab in slabs if slab is not None) + self.other_bytes

    @property
    def used_kv_bytes(self) -> int:
        """As ``BudgetCache.used_kv_bytes``."""
        slabs = [layer.compressor.slab for layer in self.budgeted]
        return sum(slab.held_bytes for slab in slabs if slab is not None) + self.other_bytes


def layers_of(
    compressors: Sequence[LayerCompressor | None], shapes: Sequence[LayerShape]
) -> CacheLayers:
    """Return empty layers.

    Args:
        compressors: one entry per model layer: a compressor, or None for one without a budget.
        shapes: what the model's configuration says of each layer.
    """
    made = (_layer(layer, shape) for layer, shape in zip(compressors, shapes, strict=True))
    first = next((i for i, shape in enumerate(shapes) if shape.kv_heads), 0)
    return CacheLayers(made, first, any(shape.bias for shape in shapes))
