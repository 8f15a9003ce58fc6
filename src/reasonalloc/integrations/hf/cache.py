"""A transformers ``Cache`` whose full-attention layers live in slabs under a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from reasonalloc.cache import LayerShape
from reasonalloc.compressor import LayerCompressor
from reasonalloc.errors import UnsupportedError
from reasonalloc.recorder import Recorder

_TAG = "_reasonalloc_layer"


def layer_of(key: Tensor) -> SlabLayer | None:
    """The compressed layer that these keys were handed to, or None."""
    layer = getattr(key, _TAG, None)
    return layer if isinstance(layer, SlabLayer) else None


class SlabLayer(CacheLayerMixin):
    """One layer under a budget.

    ``update`` only hands the new keys on, tagged with this layer: they are stored when the
    attention function has the query and the padding as well. A model that does not pass the very
    same keys to its attention is noticed in the next forward pass.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, compressor: LayerCompressor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.compressor = compressor
        self._logical = 0
        self._pending = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the slab is allocated by the first attention call."""
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Tag new keys [batch, kv_heads, q, head_dim] and count them."""
        if self._pending:
            raise UnsupportedError(
                "this model changes its keys between cache and attention, or its attention is not "
                "ReasonAlloc's: a cache made by attach() works on the attached model only"
            )
        self._pending = True
        self.is_initialized = True
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
        self._pending = False
        delattr(key, _TAG)  # the tag would keep the cache alive through the keys
        with torch.no_grad():
            return self.compressor.forward(query, key, value, mask, scaling, softcap)

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
        layers: one entry per model layer: a compressor, or the shape of a sliding layer.
        recorder: collects the compressions of all layers.
    """

    def __init__(
        self, layers: Sequence[LayerCompressor | LayerShape], recorder: Recorder, owner: object
    ) -> None:
        self.recorder = recorder
        self.owner = owner
        super().__init__(
            layers=[
                SlabLayer(layer)
                if isinstance(layer, LayerCompressor)
                else DynamicSlidingWindowLayer(sliding_window=layer.sliding_window or 0)
                for layer in layers
            ]
        )

    def _slabs(self) -> list[SlabLayer]:
        return [layer for layer in self.layers if isinstance(layer, SlabLayer)]

    def _sliding_bytes(self) -> int:
        tensors = [
            tensor
            for layer in self.layers
            if isinstance(layer, DynamicSlidingWindowLayer)
            for tensor in (layer.keys, layer.values)
        ]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def kv_bytes(self) -> int:
        """Bytes held now for keys and values, over all layers."""
        slabs = [s.compressor.slab for s in self._slabs()]
        return sum(s.kv_bytes for s in slabs if s is not None) + self._sliding_bytes()

    @property
    def bookkeeping_bytes(self) -> int:
        """Bytes held now besides keys and values."""
        return sum(s.compressor.bookkeeping_bytes for s in self._slabs())

    @property
    def used_kv_bytes(self) -> int:
        """Bytes of keys and values of the tokens that are retained now. Waits for the device."""
        size = self._sliding_bytes()
        for layer in self._slabs():
            slab = layer.compressor.slab
            if slab is not None:
                width = slab.keys.shape[-1] * slab.keys.element_size()
                width += slab.values.shape[-1] * slab.values.element_size()
                size += int(slab.lengths.sum()) * width
        return size

    @property
    def retained_tokens(self) -> list[list[list[int]]]:
        """[layers][batch][kv_heads] tokens held now, of the layers under a budget."""
        slabs = [s.compressor.slab for s in self._slabs()]
        return [slab.lengths.tolist() for slab in slabs if slab is not None]
