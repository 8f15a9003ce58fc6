"""A transformers ``Cache`` whose full-attention layers live in slabs under a budget."""

from __future__ import annotations

import operator
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.recorder import Recorder
from reasonalloc.core.shared import SharedCompressor
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.integrations.hf.cache_layers import CacheLayers, layers_of
from reasonalloc.integrations.hf.hidden import Hidden
from reasonalloc.integrations.hf.seen import SeenText
from reasonalloc.integrations.hf.slab_layer import FOREIGN_ATTENTION, UNREAD, SlabLayer
from reasonalloc.planning.memory import LayerShape

_BROKEN_OFF = (
    "an earlier call on this cache was interrupted or failed, so its layers are out of step: start "
    "with a new cache"
)


def _detached(state: Tensor | None) -> Tensor | None:
    """A state without the graph of the calls that made it, where gradients are recorded."""
    return state.detach_() if state is not None and state.requires_grad else state


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

    layers: CacheLayers

    def __init__(
        self,
        layers: Sequence[LayerCompressor | None],
        shapes: Sequence[LayerShape],
        recorder: Recorder,
        owner: Owner,
    ) -> None:
        self.recorder = recorder
        self.owner = owner
        # Not that of a model's own class, see ``OwnBudgetCache``.
        Cache.__init__(self, layers=layers_of(layers, shapes))
        #: Whether a call has looked at a state, and not ended yet; see ``settle``.
        self._moving = False
        self._latest: SlabLayer | None = None  # the layer under a budget that was updated last
        self.seen = SeenText()
        #: How far positions behind images are shifted, [batch, 1]; see ``take_shift``.
        self.shift: Tensor | None = None
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
        if layer_idx == self.layers.first:
            if not self.layers.in_step(self.get_seq_length()):
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
        return self.layers.linear

    def settle(self) -> None:
        """Take note that a forward call has ended: all its states are the new ones.

        Raises:
            UnsupportedError: a layer was to be read by others that have not read it.
        """
        self._moving = False
        if any(layer.waiting for layer in self.layers.budgeted):
            raise UnsupportedError(UNREAD)

    @property
    def single_tokens_are_real(self) -> bool:
        """Whether the masks of single new tokens need not be looked at."""
        return all(layer.decode_is_real for layer in self.layers.budgeted)

    @single_tokens_are_real.setter
    def single_tokens_are_real(self, value: bool) -> None:
        for layer in self.layers.budgeted:
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
        if past and columns > 1 and not all(layer.state.continues for layer in self.layers.states):
            raise UnsupportedError(
                "the Mamba layers of this model start anew at every call with several tokens, so a "
                "text cannot be continued: start with a new cache and the whole conversation"
            )
        trusted = columns == 1 and past > 0 and self._trust_next
        self.single_tokens_are_real = self._trust_next
        self._trust_next = self._generating
        if not trusted:
            Hidden(self.layers, self.seen).compare(mask, batch, columns)
        with torch.inference_mode(False), torch.no_grad():
            self.seen.add(ids, batch, columns)
            if mask is not None and not trusted:
                Hidden(self.layers, self.seen).note(mask, columns)

    @property
    def whole(self) -> bool:
        """Whether no call broke off in the middle: all layers have seen the same text."""
        return not self._moving and self.layers.in_step(self.get_seq_length())

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
        held = self.layers.batch
        if held is not None and held != batch:
            raise UsageError(
                f"the cache holds {held} sequences, the new tokens come in {batch}: use a "
                "new cache for another batch size"
            )

    @property
    def evicted_at(self) -> int:
        """Columns of the text at the latest compression; 0 if there was none."""
        return self.layers.evicted_at

    def reach(self, columns: int) -> int | None:
        """How far the cache can go back to have seen at most ``columns``.

        Returns:
            ``columns`` if nothing that was seen by then has been evicted since; 0 if nothing was
            ever evicted, but a layer cannot go back a part of the way; None if tokens were evicted.
        """
        return self.layers.reach(columns)

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
            self._moving, self.shift = False, None
            self.layers.clear()
        else:
            with torch.inference_mode(False), torch.no_grad():
                Hidden(self.layers, self.seen).go_back(columns)
        self.layers.shorten_windows(columns)
        self.seen.go_back(columns)

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that it holds, as tensors by name and as numbers that JSON can hold.

        Raises:
            UsageError: it has seen nothing, or a call broke off in the middle.
        """
        self.check_whole()
        if not self.seen.columns:
            raise UsageError("this cache has seen nothing yet: there is nothing to save")
        tensors, numbers = self.layers.content()
        tensors |= self.seen.content() | ({} if self.shift is None else {"shift": self.shift})
        return tensors, {"compressions": self.recorder.compressions} | numbers

    def fill(
        self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], device: torch.device
    ) -> None:
        """Take over what a cache with the same settings held; see ``content``.

        Raises:
            ValueError, KeyError, TypeError: something is missing or does not fit.
        """
        self.layers.fill(tensors, numbers, device)
        self.seen.fill(tensors)
        if not self.whole or self.get_seq_length() != self.seen.columns:
            raise ValueError("the layers have seen texts of different lengths")
        shift = tensors.get("shift")
        if shift is not None and (shift.dim() != 2 or shift.shape[0] != self.layers.batch):
            raise ValueError("the shift of positions does not fit")
        self.shift = None if shift is None else shift.to(device)
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
        if self.layers.batch is None:
            raise UsageError("this cache has seen nothing yet: there are no sequences to take")
        return self.layers.batch

    def _take(self, sequences: Tensor) -> None:
        twin = self.copy(sequences)
        self.layers, self.seen, self.shift = twin.layers, twin.seen, twin.shift
        for layer in self.layers.budgeted:
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
            twin.layers = self.layers.copied(twin.recorder, sequences)
        twin.seen, twin.shift = self.seen.copy(sequences), self.shift
        if self.shift is not None and sequences is not None:
            twin.shift = self.shift[sequences.to(self.shift.device)]
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
            for layer in self.layers.budgeted:
                layer.compressor.fix()

    @property
    def is_static(self) -> bool:
        """Whether a decode step does the device's part alone, see ``static``."""
        return any(layer.compressor.static for layer in self.layers.budgeted)

    def static(self) -> AbstractContextManager[None]:
        """Inside, a decode step does the device's part alone; ``advance`` does the host's."""
        return self.layers.static()

    def spoil(self) -> None:
        """A static step broke off: nobody knows which layers have stored their token."""
        for layer in self.layers.budgeted:
            layer.compressor.unsettled = True

    def advance(self) -> None:
        """Count a static step in every layer, and compress the layers that are due."""
        with torch.inference_mode(False), torch.no_grad():
            for layer in self.layers.budgeted:
                layer.advance()

    def replaying(self) -> AbstractContextManager[None]:
        """Inside, several new tokens are as many decode steps at once, with the same result."""
        return self.layers.replaying()

    @property
    def replayable(self) -> int:
        """Most tokens that one call may replay.

        All layers that read a shared cache see the same tokens, so none of them goes over a
        boundary before the others.
        """
        layers = [layer.compressor for layer in self.layers.budgeted]
        return min(
            (one.progress.until_boundary for one in layers if isinstance(one, SharedCompressor)),
            default=sys.maxsize,
        )

    @property
    def keeps_padding(self) -> bool:
        """Whether a layer holds padding, which masks have to hide: one with a sliding window."""
        return bool(self.layers.sliding)

    @property
    def kv_bytes(self) -> int:
        """Bytes held now for keys, values and states, over all layers."""
        return self.layers.kv_bytes

    @property
    def bookkeeping_bytes(self) -> int:
        """Bytes held now besides keys, values and states."""
        return sum(s.compressor.bookkeeping_bytes for s in self.layers.budgeted)

    @property
    def used_kv_bytes(self) -> int:
        """Bytes of what is retained now, as ``kv_bytes``. Waits for the device."""
        return self.layers.used_kv_bytes

    @property
    def retained_tokens(self) -> list[list[list[int]]]:
        """[layers][batch][kv_heads] tokens held now, of the layers under a budget."""
        slabs = [s.compressor.slab for s in self.layers.budgeted]
        return [slab.held.tolist() for slab in slabs if slab is not None]
