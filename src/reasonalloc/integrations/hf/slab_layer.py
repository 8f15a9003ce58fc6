"""One layer of a transformers ``Cache`` under a budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from reasonalloc.attention.distance import DistanceBias
from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.recorder import Recorder
from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.hf.repeated import follow
from reasonalloc.integrations.hf.sliding import check_width
from reasonalloc.planning.memory import LayerShape

_Own = TypeVar("_Own", bound="SlabLayer")
_TAG = "_reasonalloc_layer"
FOREIGN_ATTENTION = (
    "this model changes its keys or values between cache and attention, or attends twice to the "
    "same keys, which cannot run under a KV budget: detach ReasonAlloc to run it"
)

_OTHER_BIAS = (
    "this model adds a bias ('position_bias') or sinks of queries to its attention logits in "
    "another way than by distance, as its configuration says, which cannot run under a KV budget: "
    "detach ReasonAlloc to run it"
)
UNREAD = (
    "this model does not read a cache that several of its layers share as its configuration says, "
    "or hands its keys on in copies (device_map), which cannot run under a KV budget: keep the "
    "model on one device, or detach ReasonAlloc to run it"
)


def layer_of(key: Tensor) -> SlabLayer | None:
    """The compressed layer that these keys were handed to, or None.

    Raises:
        UnsupportedError: the layer has attended with these keys already.
    """
    tag = getattr(key, _TAG, None)
    if tag is not None and not isinstance(tag, SlabLayer):
        raise UnsupportedError(FOREIGN_ATTENTION)
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
        # For models that look whether a layer holds some.
        self.keys = self.values = torch.empty(0, dtype=torch.float32, device="cpu")
        self.compressor = compressor
        self.decode_is_real = False
        self.replay = False
        self._shape = shape
        self._logical = 0
        self._values: Tensor | None = None

    @property
    def waiting(self) -> int:
        """Layers that have yet to attend with the tokens of this call, of those that read it."""
        if self._values is None:
            return 0
        return self.compressor.waiting or 1 + len(self._shape.readers)

    @property
    def pending(self) -> bool:
        """Whether tokens were announced and this layer itself has not attended to them."""
        return self.waiting > len(self._shape.readers)

    @property
    def differentiable(self) -> bool:
        """Whether gradients flow through the attention."""
        return self.compressor.differentiable

    @property
    def counts_columns(self) -> bool:
        """Whether the model counts hidden tokens in distances, which are not stored here."""
        return self._shape.distances > 0

    @property
    def midway(self) -> bool:
        """Whether a call broke off in this layer, or after it in a static step."""
        return self._values is not None or self.compressor.unsettled

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Check the shapes; the slab is allocated by the first attention call."""
        check_width(f"layer {self.compressor.layer}", self._shape, key_states, value_states)
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
        follow(key_states, value_states)
        return key_states, value_states

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
        query_sinks: Tensor | None = None,
    ) -> Tensor:
        """Store the new tokens and attend, see ``LayerCompressor.forward``.

        ``bias`` is [batch, query_heads, q, distances], what logits get by distance, and
        ``query_sinks`` [batch, query_heads, q, 1], beside such a bias; or None.
        """
        if value is not self._values:
            raise UnsupportedError(FOREIGN_ATTENTION)
        if bias is not None or query_sinks is not None or self._shape.distances:
            if softcap is not None or sinks is not None:
                raise UnsupportedError(_OTHER_BIAS)
            query = self._with_bias(query, bias, query_sinks)
        if query.shape[2] == 1 and self._logical > 1 and self.decode_is_real:
            mask = None
        recorded = self.differentiable and torch.is_grad_enabled()
        # A cache may be used inside and outside of inference mode; its tensors are plain ones.
        with torch.inference_mode(False), torch.set_grad_enabled(recorded):
            sinks = None if sinks is None else sinks.detach()
            new = self._stored(key, value)
            out = self.compressor.forward(query, *new, mask, scaling, softcap, self.replay, sinks)
        if not self.compressor.waiting:  # no other layer reads these keys
            self.release(key)
        return out

    def _with_bias(self, query: Tensor, bias: Tensor | None, sinks: Tensor | None) -> Tensor:
        """Return queries as the compressor wants them, see ``DistanceBias``."""
        shape = self._shape
        known = bias is not None and bias.shape == (*query.shape[:3], shape.distances)
        if sinks is not None and sinks.shape != (*query.shape[:3], 1):
            known = False
        if not known or bias is None or (sinks is not None) != shape.query_sinks:
            raise UnsupportedError(_OTHER_BIAS)
        self.compressor.bias = DistanceBias(shape.distances, shape.query_sinks)
        parts = [query, bias, *([] if sinks is None else [sinks])]
        return torch.cat([part.to(query.dtype) for part in parts], dim=-1)

    def release(self, key: Tensor) -> None:
        """Take note that nobody attends with the keys [batch, kv_heads, q, head_dim] any more."""
        setattr(key, _TAG, True)  # used; no longer a reference that keeps the cache alive
        self._values = None

    def _stored(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the slab keeps of what the model handed to the cache."""
        return key, value

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
        """Refused: the layers of a cache go back together, see ``BudgetCache.crop``."""
        raise UnsupportedError("one layer cannot be cropped alone: call crop of the whole cache")

    def go_back(self, gone: Tensor, seen: Tensor, columns: int) -> None:
        """Forget tokens, see ``LayerCompressor.drop``."""
        self.compressor.drop(gone, seen, columns)
        self._logical = columns

    def fill(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take over what another layer held, see ``LayerCompressor.fill``."""
        shape = self._shape
        if tensors:
            tail = "tail_" if "tail_keys" in tensors else ""
            dims = tuple(tensors[f"{tail}{name}"].shape[-1] for name in ("keys", "values"))
            if (tensors["lengths"].shape[-1], dims) != (shape.kv_heads, shape.dims):
                raise ValueError(f"layer {self.compressor.layer} has another shape")
            self.is_initialized = True
        self.compressor.fill(tensors, numbers, (shape.query_heads, shape.query_dim))
        self._logical = int(numbers["columns"])

    def clear(self) -> None:
        """Forget everything."""
        self.compressor.clear()
        self._logical, self._values = 0, None
        self.is_initialized = False  # HrmText asks: what comes first is the prompt

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that it holds, as tensors by name and as numbers that JSON can hold."""
        return self.compressor.content()

    def copy(self: _Own, recorder: Recorder, sequences: Tensor | None = None) -> _Own:
        """The same content in memory of its own; see ``Slab.copy``."""
        twin = type(self)(self.compressor.copy(recorder, sequences), self._shape)
        twin._logical, twin.is_initialized = self._logical, self.is_initialized
        return twin

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: beam search."""
        raise UnsupportedError("beam search cannot run under a KV budget: use num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: the layers of a cache go together."""
        raise UnsupportedError("one layer cannot be repeated alone: call it of the whole cache")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused: the layers of a cache go together."""
        raise UnsupportedError("one layer cannot be divided alone: call it of the whole cache")

    def offload(self) -> None:
        """Refused: what is left of a cache under a budget stays on the device."""
        raise UnsupportedError("a compressed cache cannot be offloaded: lower its budget instead")

    def prefetch(self) -> None:
        """Refused, as ``offload``."""
        self.offload()

    def reset(self) -> None:
        """Refused: the layers of a cache go together."""
        raise UnsupportedError("one layer cannot be reset alone: call reset of the whole cache")
