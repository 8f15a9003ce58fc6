"""Layers that attend to an image: transformers' own cache layers, without keys of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from reasonalloc.core.recorder import Recorder


class ImageLayer(DynamicLayer):
    """A layer whose queries come from the text and whose keys from an image, as in Mllama.

    Its size is constant after the image was read; 0 while there is none.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @property
    def filled(self) -> bool:
        """Whether an image was read."""
        return self.keys is not None and self.keys.numel() > 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of an image, [batch, kv_heads, n, head_dim]."""
        # A cache may be used inside and outside of inference mode; its tensors are plain ones.
        with torch.inference_mode(False), torch.no_grad():
            key, value = key_states.detach().clone(), value_states.detach().clone()
            keys, values = super().update(key, value)
        return keys, values

    def forget(self) -> None:
        """Forget the image."""
        self.keys = self.values = None
        self.is_initialized = False

    def copy(self, recorder: Recorder, sequences: Tensor | None = None) -> ImageLayer:
        """The same content in memory of its own; see ``Slab.copy``."""
        twin = ImageLayer()
        if self.keys is not None and self.values is not None:
            rows = slice(None) if sequences is None else sequences.to(self.keys.device)
            twin.update(self.keys[rows], self.values[rows])
        return twin

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that it holds, as tensors by name and as numbers that JSON can hold."""
        held = {"keys": self.keys, "values": self.values}
        return {name: tensor for name, tensor in held.items() if tensor is not None}, {}

    def fill(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take over what another layer held, while this one is empty.

        Raises:
            ValueError, KeyError: something is missing or does not fit.
        """
        if tensors:
            keys, values = tensors["keys"], tensors["values"]
            if keys.dim() != 4 or keys.shape != values.shape:
                raise ValueError("the layers that attend to an image do not fit")
            self.update(keys, values)
