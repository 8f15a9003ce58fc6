"""Layers with a state beside or instead of keys: linear attention, Mamba, short convolutions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import LinearAttentionLayer

from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.recorder import Recorder
from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.hf.slab_layer import SlabLayer
from reasonalloc.integrations.hf.sliding import SlidingLayer
from reasonalloc.planning.memory import LayerShape
from reasonalloc.planning.states import StateShape


def _name(kind: str, index: int) -> str:
    """Name of a state among those of its layer."""
    return f"{kind}_{index}" if index else kind


def holds_states() -> bool:
    """Whether the installed transformers has the cache layers that hybrids need."""
    made = inspect.signature(LinearAttentionLayer.__init__).parameters
    return hasattr(cache_utils, "DummyLayer") and "number_of_states" in made


def check_hybrid(shapes: Sequence[LayerShape], name: str) -> None:
    """Refuse models with layers that have no keys where transformers has no such cache layers.

    Raises:
        UnsupportedError: names what to install.
    """
    plain = all(shape.kv_heads and shape.state is None for shape in shapes)
    if not plain and not holds_states():
        raise UnsupportedError(
            f"{name} cannot run under a KV budget with this transformers, which has other cache "
            "layers for linear, Mamba and convolution layers, and for layers that read another's "
            "or attend to an image: install transformers 5.23 or newer"
        )


def empty_layer() -> Any:
    """transformers' cache layer of a layer that caches nothing, such as an MLP."""
    return cache_utils.DummyLayer()


class StateLayer(LinearAttentionLayer):
    """A layer with a state of fixed size, as in transformers, of the planned bytes.

    Args:
        state: sizes that the model's configuration gives.
    """

    def __init__(self, state: StateShape) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=max(1, len(state.convs)))
        self.state = state

    def lazy_initialization(
        self,
        conv_states: Tensor | None = None,
        recurrent_states: Tensor | None = None,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
    ) -> None:
        """Allocate a state, [batch, ...]: plain tensors, of the planned types.

        Raises:
            UnsupportedError: the state has another size than the plan.
        """
        if recurrent_states is not None:
            _check_size(recurrent_states[0].numel(), self.state.recurrent)
            if self.state.wide:
                recurrent_states = recurrent_states.float()
        if conv_states is not None:
            kernel = conv_kernel_size or conv_states.shape[-1]
            planned = self.state.convs[state_idx] if self.state.convs else 0
            _check_size(conv_states[0, :, 0].numel() * kernel, planned)
            if self.state.wide_convs:
                conv_states = conv_states.float()
        # A cache may be used inside and outside of inference mode; its tensors are plain ones.
        with torch.inference_mode(False), torch.no_grad():
            LinearAttentionLayer.lazy_initialization(
                self, conv_states, recurrent_states, state_idx, conv_kernel_size
            )

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take in new inputs of the convolution; see transformers' layer."""
        with torch.inference_mode(False), torch.no_grad():
            result: Tensor = LinearAttentionLayer.update_conv_state(self, *args, **kwargs)
        return result

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor:
        """Take over a new recurrent state; see transformers' layer."""
        with torch.inference_mode(False), torch.no_grad():
            result: Tensor = LinearAttentionLayer.update_recurrent_state(self, *args, **kwargs)
        if not self.state.convs:  # transformers notes it with the convolution's
            self.has_previous_state[0] = True
        return result

    @property
    def states(self) -> dict[str, Tensor]:
        """The states that are allocated, by name."""
        held = {_name("conv", index): conv for index, conv in self.conv_states.items()}
        held["recurrent"] = self.recurrent_states[0]
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    @property
    def seen(self) -> bool:
        """Whether it has taken in anything; see ``settle`` of the cache for the time between."""
        return all(self.has_previous_state.values())

    @property
    def state_bytes(self) -> int:
        """Bytes held now."""
        return sum(tensor.nbytes for tensor in self.states.values())

    def clear_states(self) -> None:
        """Forget everything; the memory stays."""
        with torch.inference_mode(False), torch.no_grad():
            for tensor in self.states.values():
                tensor.detach_().zero_()
        self._note(False)

    def take_states(self, other: StateLayer, sequences: Tensor | None = None) -> None:
        """Take over another layer's states in memory of its own.

        Args:
            other: of the same sizes.
            sequences: [n] int64, which of the sequences, in this order; None: all.
        """
        held = other.states
        if sequences is not None:
            held = {name: tensor[sequences.to(tensor.device)] for name, tensor in held.items()}
        self._set_states(held, other.seen)

    def state_content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that it holds, as tensors by name and as numbers that JSON can hold."""
        tensors = {f"state_{name}": tensor for name, tensor in self.states.items()}
        return tensors, {"state_seen": self.seen}

    def fill_states(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take over what another layer held; see ``state_content``.

        Raises:
            ValueError, KeyError: something is missing or does not fit.
        """
        sizes = {_name("conv", index): size for index, size in enumerate(self.state.convs)}
        sizes["recurrent"] = self.state.recurrent
        held = {k: tensors[f"state_{k}"] for k in sizes if f"state_{k}" in tensors}
        wanted = {name: size for name, size in sizes.items() if size}
        found = {name: tensor[0].numel() for name, tensor in held.items()}
        if numbers["state_seen"] and found != wanted:
            raise ValueError("the state of a layer does not fit")
        exact = held["recurrent"].dtype if "recurrent" in held else torch.float32
        if self.state.wide and exact != torch.float32:
            raise ValueError("the recurrent state of a layer is not in float32")
        self._set_states(held, bool(numbers["state_seen"]))

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As ``state_content``: it holds nothing else."""
        return self.state_content()

    def fill(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """As ``fill_states``."""
        self.fill_states(tensors, numbers)

    def copy(self, recorder: Recorder, sequences: Tensor | None = None) -> StateLayer:
        """The same content in memory of its own; see ``Slab.copy``."""
        twin = StateLayer(self.state)
        twin.take_states(self, sequences)
        return twin

    def _set_states(self, held: Mapping[str, Tensor], seen: bool) -> None:
        for name, tensor in held.items():
            kind, index = name.partition("_")[::2]
            given: dict[str, Any] = {f"{kind}_states": tensor, "state_idx": int(index or 0)}
            StateLayer.lazy_initialization(self, **given)
            with torch.inference_mode(False), torch.no_grad():
                self.states[name].copy_(tensor)
        self._note(seen)

    def _note(self, seen: bool) -> None:
        self.has_previous_state = dict.fromkeys(self.has_previous_state, seen)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the layers of a cache go back together, see ``BudgetCache.crop``."""
        raise UnsupportedError("one layer cannot be cropped alone: call crop of the whole cache")


class SlabAndStateLayer(SlabLayer, StateLayer):
    """A layer with attention under a budget and a state, as in Falcon-H1.

    Args:
        compressor: storage and cadence.
        shape: what the model's configuration says of the layer, which has a state.
    """

    def __init__(self, compressor: LayerCompressor, shape: LayerShape) -> None:
        if shape.state is None:
            raise RuntimeError("a layer without a state")
        StateLayer.__init__(self, shape.state)
        SlabLayer.__init__(self, compressor, shape)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Prepare the slab for keys and values, or allocate a state that is given by name."""
        if len(args) == 2:
            SlabLayer.lazy_initialization(self, *args)
        else:
            StateLayer.lazy_initialization(self, **kwargs)

    def fill(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take over what another layer held."""
        kept = {k: v for k, v in tensors.items() if not k.startswith("state_")}
        SlabLayer.fill(self, kept, numbers)
        self.fill_states(tensors, numbers)

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that it holds, as tensors by name and as numbers that JSON can hold."""
        tensors, numbers = SlabLayer.content(self)
        states, seen = self.state_content()
        return {**tensors, **states}, {**numbers, **seen}

    def clear(self) -> None:
        """Forget everything."""
        SlabLayer.clear(self)
        self.clear_states()

    def copy(self, recorder: Recorder, sequences: Tensor | None = None) -> SlabAndStateLayer:
        """The same content in memory of its own; see ``Slab.copy``."""
        twin = SlabLayer.copy(self, recorder, sequences)
        twin.take_states(self, sequences)
        return twin


class SlidingAndStateLayer(SlidingLayer, StateLayer):  # type: ignore[misc]  # as transformers'
    """A layer whose attention has a sliding window, and a state, as in Inkling.

    Args:
        shape: what the model's configuration says of the layer, which has a state.
    """

    def __init__(self, shape: LayerShape) -> None:
        if shape.state is None:
            raise RuntimeError("a layer without a state")
        StateLayer.__init__(self, shape.state)
        SlidingLayer.__init__(self, shape)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Prepare for keys and values, or allocate a state that is given by name."""
        if len(args) == 2:
            SlidingLayer.lazy_initialization(self, *args)
        else:
            StateLayer.lazy_initialization(self, **kwargs)

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that it holds, as tensors by name and as numbers that JSON can hold."""
        tensors, numbers = SlidingLayer.content(self)
        states, seen = self.state_content()
        return {**tensors, **states}, {**numbers, **seen}

    def fill(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take over what another layer held."""
        kept = {k: v for k, v in tensors.items() if not k.startswith("state_")}
        SlidingLayer.fill(self, kept, numbers)
        self.fill_states(tensors, numbers)

    def copy(self, recorder: Recorder, sequences: Tensor | None = None) -> SlidingAndStateLayer:
        """The same content in memory of its own; see ``Slab.copy``."""
        twin = SlidingLayer.copy(self, recorder, sequences)
        twin.take_states(self, sequences)
        return twin


def _check_size(found: int, planned: int) -> None:
    if found != planned:
        raise UnsupportedError(
            f"a layer keeps a state of {found} numbers per sequence, but the model's configuration "
            f"says {planned}: its memory cannot be planned"
        )
