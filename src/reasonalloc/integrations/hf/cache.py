"""A transformers ``Cache`` whose full-attention layers live in slabs under a budget."""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.recorder import Recorder
from reasonalloc.core.shared import SharedCompressor
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.integrations.hf.images import ImageLayer
from reasonalloc.integrations.hf.latent import LatentLayer
from reasonalloc.integrations.hf.paired import PairedLayer
from reasonalloc.integrations.hf.seen import SeenText, following
from reasonalloc.integrations.hf.slab_layer import FOREIGN_ATTENTION, UNREAD, SlabLayer
from reasonalloc.integrations.hf.sliding import SlidingLayer
from reasonalloc.integrations.hf.states import (
    SlabAndStateLayer,
    SlidingAndStateLayer,
    StateLayer,
    empty_layer,
)
from reasonalloc.planning.memory import LayerShape

_BROKEN_OFF = (
    "an earlier call on this cache was interrupted or failed, so its layers are out of step: start "
    "with a new cache"
)


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


def _detached(state: Tensor | None) -> Tensor | None:
    """A state without the graph of the calls that made it, where gradients are recorded."""
    return state.detach_() if state is not None and state.requires_grad else state


#: Layers that can copy what they hold, and give and take it; the others hold nothing.
_HOLDING = (SlabLayer, SlidingLayer, StateLayer, ImageLayer)


class Owner(Protocol):
    """What a cache must know of the attachment that made it."""

    @property
    def attached(self) -> bool:
        """Whether the model still runs under the budget."""
        ...


class Stepper(Protocol):
    """What runs the forward calls of a ``generate`` call, see ``StaticStep``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's ``forward``."""
        ...

    def forget(self) -> None:
        """Do not repeat what was captured."""
        ...


class BudgetCache(Cache):
    """The cache that ``attach`` gives to ``generate``; pass it on to continue a conversation.

    Args:
        layers: one entry per model layer: a compressor, or None for a layer without a budget.
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
        Cache.__init__(  # not that of a model's own class, see ``OwnBudgetCache``
            self, layers=[_layer(layer, shape) for layer, shape in zip(layers, shapes, strict=True)]
        )
        self._first = next((i for i, shape in enumerate(shapes) if shape.kv_heads), 0)
        #: Whether a call has looked at a state, and not ended yet; see ``settle``.
        self._moving = False
        self._compressed = [s for s in self.layers if isinstance(s, SlabLayer)]
        self._counted = any(shape.bias for shape in shapes)  # keys hold where they stand
        self._latest: SlabLayer | None = None  # the layer under a budget that was updated last
        self.seen = SeenText()
        #: Runs the forward calls of the ``generate`` call that has the cache, see ``StaticStep``.
        self.stepper: Stepper | None = None
        self._announced = 0  # columns of the call that the model is about to do
        self._generating = self._trust_next = False  # see ``only_real_tokens``
        self._in_use = threading.Lock()

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
        if layer_idx == self._first:
            if not self._in_step:
                raise UsageError(_BROKEN_OFF)
        elif self._latest is not None and self._latest.pending:
            raise UnsupportedError(FOREIGN_ATTENTION)
        layer = self.layers[layer_idx]
        self._latest = layer if isinstance(layer, SlabLayer) else self._latest
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return keys, values

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """State of a layer's convolution, [batch, ...], which the model may change; or None."""
        self._moving = True
        return _detached(super().get_conv_state(layer_idx, state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Recurrent state of a layer, [batch, ...], which the model may change; or None."""
        self._moving = True
        return _detached(super().get_recurrent_state(layer_idx, state_idx))

    @property
    def is_linear(self) -> list[bool]:
        """Per layer whether it has a state and no attention."""
        return [
            isinstance(layer, LinearAttentionCacheLayerMixin)
            and not isinstance(layer, CacheLayerMixin)
            for layer in self.layers
        ]

    def settle(self) -> None:
        """Take note that a forward call has ended: all its states are the new ones.

        Raises:
            UnsupportedError: a layer was to be read by others that have not read it.
        """
        self._moving = False
        if any(layer.waiting for layer in self._compressed):
            raise UnsupportedError(UNREAD)

    @property
    def single_tokens_are_real(self) -> bool:
        """Whether the masks of single new tokens need not be looked at."""
        return all(layer.decode_is_real for layer in self._compressed)

    @single_tokens_are_real.setter
    def single_tokens_are_real(self, value: bool) -> None:
        for layer in self._compressed:
            layer.decode_is_real = value

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, nobody else may generate with this cache.

        Raises:
            UsageError: somebody does.
        """
        if not self._in_use.acquire(blocking=False):
            raise UsageError(
                "this cache is in use by another generate call: give each call a cache of its own, "
                "such as copy.deepcopy(cache)"
            )
        try:
            yield
        finally:
            self._in_use.release()

    def announce(
        self, ids: Tensor | None, batch: int, columns: int, mask: Tensor | None, inner: bool
    ) -> None:
        """Take note of a forward call before it runs: its tokens, and what its mask hides.

        What is hidden now and was visible before is dropped from the slabs.

        Args:
            ids: [batch, columns] of the new tokens, or None if they come as embeddings.
            batch, columns: of the new tokens.
            mask: [batch, all columns] 2-D mask; None if everything is visible.
            inner: whether the call is the one of a model inside another, which may have been
                announced by the outer one.

        Raises:
            UsageError: another batch size, a mask that does not fit or shows what was hidden, or
                layers that are out of step.
        """
        past, announced = self.get_seq_length(), self._announced
        self._announced = 0 if inner else past + columns
        if inner and announced == past + columns:
            return
        self.check_whole()
        self.check_batch(batch)
        if past and columns > 1 and not all(layer.state.continues for layer in self._states):
            raise UnsupportedError(
                "the Mamba layers of this model start anew at every call with several tokens, so a "
                "text cannot be continued: start with a new cache and the whole conversation"
            )
        trusted = columns == 1 and past > 0 and self._trust_next
        self.single_tokens_are_real = self._trust_next
        self._trust_next = self._generating
        if not trusted:
            self._look(mask, batch, columns)
        with torch.inference_mode(False), torch.no_grad():
            self.seen.add(ids, batch, columns)
            if mask is not None and not trusted:
                self._place(mask, columns)

    @property
    def whole(self) -> bool:
        """Whether no call broke off in the middle: all layers have seen the same text."""
        return self._in_step and not self._moving

    @property
    def _in_step(self) -> bool:
        """Whether all layers with keys have seen equally many tokens."""
        length = self.get_seq_length()
        return all(
            layer.get_seq_length() == length and not (isinstance(layer, SlabLayer) and layer.midway)
            for layer in (*self._compressed, *self._sliding)
        )

    def check_whole(self) -> None:
        """Refuse a cache that a call left in the middle; forget one that broke off before it.

        Raises:
            UsageError: the layers are out of step.
        """
        length = self.get_seq_length()
        if not self.whole or self.seen.columns < length:
            raise UsageError(_BROKEN_OFF)
        self.seen.go_back(length)  # nothing, unless a call broke off before its first layer

    def check_batch(self, batch: int) -> None:
        """Refuse another number of sequences than the cache holds.

        Raises:
            UsageError: names both.
        """
        slab = self._compressed[0].compressor.slab
        if slab is not None and slab.batch != batch:
            raise UsageError(
                f"the cache holds {slab.batch} sequences, the new tokens come in {batch}: use a "
                "new cache for another batch size"
            )

    @property
    def evicted_at(self) -> int:
        """Columns of the text at the latest compression; 0 if there was none."""
        return max(layer.compressor.evicted_at for layer in self._compressed)

    def _look(self, mask: Tensor | None, batch: int, columns: int) -> None:
        """Compare a mask with what was seen; drop what it hides."""
        past = self.seen.columns
        if past == 0:
            return
        if mask is None:
            if self.seen.padded:
                raise UsageError(
                    f"no attention_mask was given, but of the {past} tokens that the cache has "
                    "seen some were hidden (padding): pass the mask over the whole conversation"
                )
            return
        if mask.shape != (batch, past + columns):
            raise UsageError(
                f"the attention mask covers {mask.shape[-1]} tokens, but the cache has seen "
                f"{past} and {columns} are new: pass a mask over all of them"
            )
        if not self.seen.padded and bool(mask[:, :past].all()):
            return
        with torch.inference_mode(False), torch.no_grad():
            visible = mask[:, :past].bool()
            places = self.seen.places(batch, mask.device)
            if bool((visible & (places < 0)).any()):
                raise UsageError(
                    "attention_mask shows tokens that an earlier call on this cache hid: they were "
                    "not stored; hide them again, or start with a new cache"
                )
            hidden = ~visible & (places >= 0)
            if bool(hidden.any()):
                self._refuse_to_hide()
                self._refuse_gaps(hidden, visible)
                self._forget(hidden, past)

    def _refuse_to_hide(self) -> None:
        if self._states:
            raise UnsupportedError(
                "attention_mask hides tokens that layers with a state (linear attention, Mamba, "
                "convolution) have taken in or would take in: start with a new cache"
            )

    def _refuse_gaps(self, hidden: Tensor, visible: Tensor) -> None:
        """Refuse to hide tokens before others, whose bias would change (ALiBi)."""
        if self._counted and bool((visible & (hidden.cumsum(dim=1) > 0)).any()):
            raise UnsupportedError(
                "attention_mask hides tokens before others that stay, whose position would change "
                "(ALiBi), but keys were stored with it: start with a new cache"
            )

    def _forget(self, hidden: Tensor, columns: int) -> None:
        """Drop visible columns, [batch, columns so far] bool, of which ``columns`` are kept."""
        places = self.seen.places(hidden.shape[0], hidden.device)
        width = max(1, int(places.max()) + 1)
        spare = places.masked_fill(~hidden, width)
        gone = torch.zeros(len(places), width + 1, dtype=torch.bool, device=hidden.device)
        gone = gone.scatter_(1, spare, True)[:, :width]
        places = places.masked_fill(hidden, -1)
        for layer in self._compressed:
            slab = layer.compressor.slab
            where = hidden.device if slab is None else slab.device
            layer.go_back(gone.to(where), following(places).to(where), columns)
        if columns == self.seen.columns:
            self.seen.set_places(places)

    def _place(self, mask: Tensor, columns: int) -> None:
        """Note which of the new columns are hidden."""
        fresh = mask[:, -columns:].bool()
        if bool(fresh.all()):
            return
        if columns == 1:
            self._refuse_to_hide()  # the model hides nothing from a state in calls with one token
        places = self.seen.places(len(mask), mask.device)
        old = places[:, :-columns]
        new = following(old)[:, None] + fresh.long().cumsum(dim=1) - 1
        places = torch.cat([old, new.masked_fill(~fresh, -1)], dim=1)
        between = (places[:, 1:] < 0) & (places[:, :-1] >= 0)
        if any(layer.counts_columns for layer in self._compressed) and bool(between.any()):
            raise UnsupportedError(
                "attention_mask hides tokens behind others, which this model counts in the "
                "distances that its attention depends on: pad on the left"
            )
        self.seen.set_places(places)

    def reach(self, columns: int) -> int | None:
        """How far the cache can go back to have seen at most ``columns``.

        Returns:
            ``columns`` if nothing that was seen by then has been evicted since; 0 if nothing was
            ever evicted, but a layer cannot go back a part of the way; None if tokens were evicted.
        """
        if columns < self.evicted_at:
            return None
        if any(columns < layer.compressor.protected_columns for layer in self._compressed):
            return None if self.evicted_at else 0  # the new prompt is to be protected as a whole
        if any(layer.filled for layer in self._images):
            return None  # the next call may not bring the image again
        bounded = any(s.get_seq_length() >= s.sliding_window for s in self._sliding)
        bounded = bounded or bool(self._states)
        if bounded or any(layer.compressor.keeps_state for layer in self._compressed):
            return None if self.evicted_at else 0
        return columns

    def crop(self, tokens_to_remove: int = 0, max_length: int = 0) -> None:
        """Take back the end of the text, where nothing before it was evicted since.

        Args:
            tokens_to_remove: columns that stay, or, if negative, columns that are taken back; 0
                changes nothing.
            max_length: the name of the same in older transformers.

        Raises:
            UnsupportedError: tokens that would have to come back were evicted, or the policy keeps
                numbers per token that cannot go back.
        """
        given = max_length or tokens_to_remove
        if isinstance(given, (bool, Tensor)) or not hasattr(given, "__index__"):
            raise UnsupportedError(f"crop takes a number of tokens, not {given!r}")
        max_length = operator.index(given)
        self.check_whole()
        past = self.get_seq_length()
        columns = past if max_length == 0 else max_length + (past if max_length < 0 else 0)
        columns = max(0, columns)
        if columns >= past:
            return
        if columns and self.reach(columns) != columns:
            raise UnsupportedError(self._why_not(columns))
        self.go_back(columns)

    def _why_not(self, columns: int) -> str:
        if self.evicted_at > columns:
            return (
                f"this cache cannot go back to its first {columns} tokens: at {self.evicted_at} "
                "tokens it evicted some of them; start with a new cache"
            )
        return (
            f"this cache cannot go back to its first {columns} tokens: its policy keeps numbers "
            "per token, or a layer its sliding window or state, which cannot; start with a new "
            "cache"
        )

    def go_back(self, columns: int) -> None:
        """Forget everything behind the first ``columns``; see ``reach``.

        Raises:
            UsageError: a call broke off in the middle; to 0 it can go all the same.
        """
        if columns:
            self.check_whole()
        self._announced = 0
        if columns == 0:
            self._moving = False
            for cleared in self._compressed:
                cleared.clear()
            for state in self._states:
                state.clear_states()
            for image in self._images:
                image.forget()
        else:
            with torch.inference_mode(False), torch.no_grad():
                slab = self._compressed[0].compressor.slab
                if slab is not None:
                    places = self.seen.places(slab.batch, slab.device)
                    late = torch.arange(places.shape[1], device=places.device) >= columns
                    self._forget(late & (places >= 0), columns)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, SlidingLayer):
                self.layers[index] = layer.shortened(columns)
        self.seen.go_back(columns)

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that it holds, as tensors by name and as numbers that JSON can hold.

        Raises:
            UsageError: it has seen nothing, or a call broke off in the middle.
        """
        self.check_whole()
        if not self.seen.columns:
            raise UsageError("this cache has seen nothing yet: there is nothing to save")
        tensors = dict(self.seen.content())
        numbers: dict[str, Any] = {"compressions": self.recorder.compressions}
        for index, layer in enumerate(self.layers):
            if isinstance(layer, _HOLDING):
                own, numbers[str(index)] = layer.content()
                tensors |= {f"{index}.{name}": tensor for name, tensor in own.items()}
        return tensors, numbers

    def fill(
        self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], device: torch.device
    ) -> None:
        """Take over what a cache with the same settings held; see ``content``.

        Raises:
            ValueError, KeyError, TypeError: something is missing or does not fit.
        """
        for index, layer in enumerate(self.layers):
            start = f"{index}."
            own = {
                name.removeprefix(start): tensor.to(device)
                for name, tensor in tensors.items()
                if name.startswith(start)
            }
            if isinstance(layer, _HOLDING):
                layer.fill(own, numbers[str(index)])
        self.seen.fill(tensors)
        if not self.whole or self.get_seq_length() != self.seen.columns:
            raise ValueError("the layers have seen texts of different lengths")
        self.recorder.compressions = int(numbers["compressions"])

    def __deepcopy__(self, memo: dict[int, Any]) -> BudgetCache:
        """A cache of the same attachment with the same content, in memory of its own."""
        twin = self.copy()
        memo[id(self)] = twin
        return twin

    def __copy__(self) -> BudgetCache:
        """As a deep copy: two caches that share memory would overwrite each other."""
        return self.copy()

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.go_back(0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every sequence ``repeats`` times, as for several answers to one prompt."""
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise UnsupportedError(f"repeats={repeats!r} must be a whole number of at least 1")
        self._take(torch.arange(self._sequences(), device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at ``indices``, [n] int64 or bool, in this order."""
        if not isinstance(indices, Tensor):
            indices = torch.tensor(indices, dtype=torch.int64, device="cpu")
        whole = torch.arange(self._sequences(), device=indices.device)
        self._take(whole[indices].flatten())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: beam search."""
        raise UnsupportedError("beam search cannot run under a KV budget: use num_beams=1")

    def _sequences(self) -> int:
        slab = self._compressed[0].compressor.slab
        if slab is None:
            raise UsageError("this cache has seen nothing yet: there are no sequences to take")
        return slab.batch

    def _take(self, sequences: Tensor) -> None:
        twin = self.copy(sequences)
        self.layers, self._compressed, self.seen = twin.layers, twin._compressed, twin.seen
        for layer in self._compressed:
            layer.compressor.report_to(self.recorder)
        if self.stepper is not None:
            self.stepper.forget()  # it repeats a step on the old memory

    def copy(self, sequences: Tensor | None = None) -> BudgetCache:
        """A cache of the same attachment with the same content, in memory of its own.

        Args:
            sequences: [n] int64, which of the sequences, in this order; None: all.

        Raises:
            UsageError: a call broke off in the middle.
        """
        self.check_whole()
        twin = type(self)((), (), self.recorder.copy(), self.owner)
        with torch.inference_mode(False), torch.no_grad():
            twin.layers = [
                layer.copy(twin.recorder, sequences)
                if isinstance(layer, _HOLDING)
                else empty_layer()
                for layer in self.layers
            ]
        twin._first, twin._counted = self._first, self._counted
        twin._compressed = [s for s in twin.layers if isinstance(s, SlabLayer)]
        twin.seen = self.seen.copy(sequences)
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refused: a cache belongs to the attachment that made it."""
        raise UsageError(
            "a cache under a KV budget cannot be pickled: save it with save_cache(cache, path) of "
            "its attachment, and load it there with load_cache(path)"
        )

    @contextmanager
    def only_real_tokens(self) -> Iterator[None]:
        """Inside, single new tokens after the first call are never padding, and hide nothing.

        Their masks need not be looked at.
        """
        self._generating, self._trust_next = True, False
        try:
            yield
        finally:
            self._generating = self._trust_next = self.single_tokens_are_real = False

    def fix(self) -> None:
        """Prepare static steps, after the prompt; see ``LayerCompressor.fix``."""
        with torch.inference_mode(False), torch.no_grad():
            for layer in self._compressed:
                layer.compressor.fix()

    @property
    def is_static(self) -> bool:
        """Whether a decode step does the device's part alone, see ``static``."""
        return any(layer.compressor.static for layer in self._compressed)

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

    @property
    def replayable(self) -> int:
        """Most tokens that one call may replay.

        All layers that read a shared cache see the same tokens, so none of them goes over a
        boundary before the others.
        """
        layers = [layer.compressor for layer in self._compressed]
        return min(
            (one.progress.until_boundary for one in layers if isinstance(one, SharedCompressor)),
            default=sys.maxsize,
        )

    @property
    def keeps_padding(self) -> bool:
        """Whether a layer holds padding, which masks have to hide: one with a sliding window."""
        return bool(self._sliding)

    @property
    def _sliding(self) -> list[SlidingLayer]:
        return [s for s in self.layers if isinstance(s, SlidingLayer)]

    @property
    def _images(self) -> list[ImageLayer]:
        return [s for s in self.layers if isinstance(s, ImageLayer)]

    @property
    def _states(self) -> list[StateLayer]:
        return [s for s in self.layers if isinstance(s, StateLayer)]

    def _other_bytes(self) -> int:
        """Bytes of the layers with a sliding window, of images and of states."""
        bounded = [t for s in (*self._sliding, *self._images) for t in (s.keys, s.values)]
        size = sum(tensor.nbytes for tensor in bounded if tensor is not None)
        return size + sum(layer.state_bytes for layer in self._states)

    @property
    def kv_bytes(self) -> int:
        """Bytes held now for keys, values and states, over all layers."""
        slabs = [s.compressor.slab for s in self._compressed]
        return sum(s.kv_bytes for s in slabs if s is not None) + self._other_bytes()

    @property
    def bookkeeping_bytes(self) -> int:
        """Bytes held now besides keys, values and states."""
        return sum(s.compressor.bookkeeping_bytes for s in self._compressed)

    @property
    def used_kv_bytes(self) -> int:
        """Bytes of what is retained now, as ``kv_bytes``. Waits for the device."""
        size = self._other_bytes()
        for layer in self._compressed:
            slab = layer.compressor.slab
            if slab is not None:
                size += slab.held_bytes
        return size

    @property
    def retained_tokens(self) -> list[list[list[int]]]:
        """[layers][batch][kv_heads] tokens held now, of the layers under a budget."""
        slabs = [s.compressor.slab for s in self._compressed]
        return [slab.held.tolist() for slab in slabs if slab is not None]
