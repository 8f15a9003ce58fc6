"""A transformers ``Cache`` whose full-attention layers live in slabs under a budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from reasonalloc.cache import LayerShape
from reasonalloc.compressor import LayerCompressor
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.recorder import Recorder

_TAG = "_reasonalloc_layer"
_FOREIGN_ATTENTION = (
    "this model changes its keys or values between cache and attention, or attends twice to the "
    "same keys, which cannot run under a KV budget: detach ReasonAlloc to run it"
)


def held_bytes(layers: Iterable[Any]) -> int:
    """Bytes that cache layers of transformers' own hold for keys and values."""
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


class Owner(Protocol):
    """What a cache must know of the attachment that made it."""

    @property
    def attached(self) -> bool:
        """Whether the model still runs under the budget."""
        ...


def layer_of(key: Tensor) -> SlabLayer | None:
    """The compressed layer that these keys were handed to, or None.

    Raises:
        UnsupportedError: the layer has attended with these keys already.
    """
    tag = getattr(key, _TAG, None)
    if tag is not None and not isinstance(tag, SlabLayer):
        raise UnsupportedError(_FOREIGN_ATTENTION)
    return tag


class SlabLayer(CacheLayerMixin):
    """One layer under a budget.

    ``update`` only hands the new keys on, tagged with this layer: they are stored when the
    attention function has the query and the padding as well.

    Args:
        compressor: storage and cadence.
        shape: what the model's configuration says of the layer.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, compressor: LayerCompressor, shape: LayerShape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.compressor = compressor
        self.decode_is_real = False
        self.replay = False
        self._shape = shape
        self._logical = 0
        self._values: Tensor | None = None

    @property
    def pending(self) -> bool:
        """Whether tokens were announced and not attended to."""
        return self._values is not None

    @property
    def midway(self) -> bool:
        """Whether a call broke off in this layer, or after it in a static step."""
        return self.pending or self.compressor.unsettled

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Check the shapes; the slab is allocated by the first attention call."""
        found = (key_states.shape[1], key_states.shape[3])
        if found != (self._shape.kv_heads, self._shape.head_dim):
            raise UnsupportedError(
                f"layer {self.compressor.layer} has {found[0]} KV heads of width {found[1]}, but "
                f"the model's configuration says {self._shape.kv_heads} of {self._shape.head_dim}: "
                "its memory cannot be planned"
            )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Tag new keys [batch, kv_heads, q, head_dim] and count them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._values = value_states
        if not self.compressor.static:
            self._logical += key_states.shape[-2]
        setattr(key_states, _TAG, self)
        return key_states, value_states

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Store the new tokens and attend, see ``LayerCompressor.forward``."""
        if value is not self._values:
            raise UnsupportedError(_FOREIGN_ATTENTION)
        if query.shape[2] == 1 and self._logical > 1 and self.decode_is_real:
            mask = None
        # A cache may be used inside and outside of inference mode; its tensors are plain ones.
        with torch.inference_mode(False), torch.no_grad():
            out = self.compressor.forward(
                query, key, value, mask, scaling, softcap, replay=self.replay
            )
        setattr(key, _TAG, True)  # used; no longer a reference that keeps the cache alive
        self._values = None
        return out

    def advance(self) -> None:
        """The host's part of a static step, see ``LayerCompressor.advance``."""
        self._logical += 1
        self.compressor.advance()

    def get_seq_length(self) -> int:
        """Logical length: tokens per sequence so far, padding and evicted ones included."""
        return self._logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask covers the new tokens alone: everything older in the slab is visible."""
        return query_length, self._logical

    def get_max_length(self) -> int:
        """No limit on the logical length."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Name of ``get_max_length`` before transformers 5.14."""
        return -1

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: evicted tokens are gone."""
        raise UnsupportedError("a compressed cache cannot be cropped: evicted tokens are gone")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: beam search."""
        raise UnsupportedError("beam search cannot run under a KV budget: use num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused."""
        raise UnsupportedError("a compressed cache cannot be repeated: repeat the prompt instead")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused."""
        raise UnsupportedError("sequences cannot be taken out of a compressed cache")

    def reset(self) -> None:
        """Refused: make a new cache."""
        raise UnsupportedError("a compressed cache cannot be reset: make a new one")


class BudgetCache(Cache):
    """The cache that ``attach`` gives to ``generate``; pass it on to continue a conversation.

    Args:
        layers: one entry per model layer: a compressor, or None for a layer that slides.
        shapes: what the model's configuration says of each layer.
        recorder: collects the compressions of all layers.
        owner: the attachment that made the cache.
    """

    def __init__(
        self,
        layers: Sequence[LayerCompressor | None],
        shapes: Sequence[LayerShape],
        recorder: Recorder,
        owner: Owner,
    ) -> None:
        self.recorder = recorder
        self.owner = owner
        super().__init__(
            layers=[
                SlabLayer(layer, shape)
                if layer is not None
                else DynamicSlidingWindowLayer(sliding_window=shape.sliding_window or 0)
                for layer, shape in zip(layers, shapes, strict=True)
            ]
        )
        self._compressed = [s for s in self.layers if isinstance(s, SlabLayer)]
        self._latest: SlabLayer | None = None  # the layer under a budget that was updated last

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand new keys and values to a layer; refuses a cache that is out of step.

        Raises:
            UsageError: the attachment is gone, or an earlier call broke off in the middle.
            UnsupportedError: a layer before this one has not attended with what it was given.
        """
        if not self.owner.attached:
            raise UsageError(
                "this cache belongs to a KV budget that was detached: attach again and start anew"
            )
        if layer_idx == 0:
            lengths = {layer.get_seq_length() for layer in self._compressed}
            if len(lengths) > 1 or any(layer.midway for layer in self._compressed):
                raise UsageError(
                    "an earlier call on this cache was interrupted or failed, so its layers are "
                    "out of step: start with a new cache"
                )
        elif self._latest is not None and self._latest.pending:
            raise UnsupportedError(_FOREIGN_ATTENTION)
        layer = self.layers[layer_idx]
        self._latest = layer if isinstance(layer, SlabLayer) else self._latest
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    @contextmanager
    def only_real_tokens(self) -> Iterator[None]:
        """Inside, single new tokens are never padding: their masks need not be looked at."""
        for layer in self._compressed:
            layer.decode_is_real = True
        try:
            yield
        finally:
            for layer in self._compressed:
                layer.decode_is_real = False

    def fix(self) -> None:
        """Prepare static steps, after the prompt; see ``LayerCompressor.fix``."""
        with torch.inference_mode(False), torch.no_grad():
            for layer in self._compressed:
                layer.compressor.fix()

    @contextmanager
    def static(self) -> Iterator[None]:
        """Inside, a decode step does the device's part alone; ``advance`` does the host's."""
        for layer in self._compressed:
            layer.compressor.static = True
        try:
            yield
        finally:
            for layer in self._compressed:
                layer.compressor.static = False

    def spoil(self) -> None:
        """A static step broke off: nobody knows which layers have stored their token."""
        for layer in self._compressed:
            layer.compressor.unsettled = True

    def advance(self) -> None:
        """Count a static step in every layer, and compress the layers that are due."""
        with torch.inference_mode(False), torch.no_grad():
            for layer in self._compressed:
                layer.advance()

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Inside, several new tokens are as many decode steps at once, with the same result."""
        for layer in self._compressed:
            layer.replay = True
        try:
            yield
        finally:
            for layer in self._compressed:
                layer.replay = False

    def _sliding_bytes(self) -> int:
        return held_bytes(s for s in self.layers if isinstance(s, DynamicSlidingWindowLayer))

    @property
    def kv_bytes(self) -> int:
        """Bytes held now for keys and values, over all layers."""
        slabs = [s.compressor.slab for s in self._compressed]
        return sum(s.kv_bytes for s in slabs if s is not None) + self._sliding_bytes()

    @property
    def bookkeeping_bytes(self) -> int:
        """Bytes held now besides keys and values."""
        return sum(s.compressor.bookkeeping_bytes for s in self._compressed)

    @property
    def used_kv_bytes(self) -> int:
        """Bytes of keys and values of the tokens that are retained now. Waits for the device."""
        size = self._sliding_bytes()
        for layer in self._compressed:
            slab = layer.compressor.slab
            if slab is not None:
                width = slab.keys.shape[-1] * slab.keys.element_size()
                width += slab.values.shape[-1] * slab.values.element_size()
                size += int(slab.lengths.sum()) * width
        return size

    @property
    def retained_tokens(self) -> list[list[list[int]]]:
        """[layers][batch][kv_heads] tokens held now, of the layers under a budget."""
        slabs = [s.compressor.slab for s in self._compressed]
        return [slab.lengths.tolist() for slab in slabs if slab is not None]
