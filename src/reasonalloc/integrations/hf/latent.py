"""Latent attention (MLA) of transformers models: their latents go through the cache unexpanded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reasonalloc.attention.latent import LatentHeads
from reasonalloc.core.recorder import Recorder
from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.hf.slab_layer import FOREIGN_ATTENTION, SlabLayer, layer_of
from reasonalloc.planning.memory import LayerShape

_EXPAND = "expand_kv"


class LatentLayer(SlabLayer):
    """A layer under a budget whose tokens are latents with their rotary keys.

    Attributes:
        heads: how they are read; set by ``Unexpanded`` at every call, before ``attend``.
    """

    heads: LatentHeads | None = None

    def _stored(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return one vector per token, of latents [batch, 1, q, rank] and rotary keys."""
        if self.heads is None:
            raise UnsupportedError(FOREIGN_ATTENTION)
        self.compressor.latent = self.heads
        tokens = torch.cat([key, value], dim=-1)
        return tokens, tokens[..., :0]

    def copy(self, recorder: Recorder, sequences: Tensor | None = None) -> LatentLayer:
        """The same content in memory of its own; see ``Slab.copy``."""
        twin = super().copy(recorder, sequences)
        twin.heads = self.heads
        return twin


class Unexpanded:
    """Stands for ``expand_kv`` of an attention module: leaves latents of a budgeted layer alone.

    Without a cache under a budget it expands them as the module does.

    Args:
        module: with ``kv_b_proj``, which expands latents.
        shape: what the model's configuration says of the layer.
    """

    def __init__(self, module: Any, shape: LayerShape) -> None:
        self._module = module
        self._shape = shape
        self._expand = getattr(module, _EXPAND)
        self._read: LatentHeads | None = None
        self._version: tuple[int, int] | None = None

    def __call__(self, latents: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values, or latents and rotary keys as they are."""
        layer = layer_of(latents)
        if not isinstance(layer, LatentLayer):
            keys, values = self._expand(latents, rotary)
            return keys, values
        if not layer.compressor.static:
            layer.heads = self._heads(latents)
        elif layer.heads is None:  # a step that may be noted or captured: nothing is looked at
            layer.heads = self._read or self._keep(self._weight(latents))
        return latents, rotary

    def _heads(self, latents: Tensor) -> LatentHeads:
        """Return the matrices of the heads: read again where they may have changed."""
        known = self._read
        # A cache may be used inside and outside of inference mode; its tensors are plain ones.
        with torch.inference_mode(False), torch.no_grad():
            if _is_plain(self._module.kv_b_proj):
                weight = self._weight(latents)
                version = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
                if known is not None and version == self._version:
                    return known
                self._version = version
                return self._keep(weight)
            if known is not None and latents.shape[2] == 1:
                return known
            weight = self._weight(latents)
            if known is not None and torch.equal(weight, known.weight):
                return known
            return self._keep(weight)

    def _weight(self, latents: Tensor) -> Tensor:
        """[query_heads * (plain + value_dim), rank]: what latents are multiplied with."""
        projection = self._module.kv_b_proj
        if _is_plain(projection):
            weight: Tensor = projection.weight.detach()
        else:  # quantised, adapted, elsewhere: measured
            every = torch.eye(latents.shape[-1], dtype=latents.dtype, device=latents.device)
            weight = projection(every).detach().T.contiguous()
        return weight

    def _keep(self, weight: Tensor) -> LatentHeads:
        latent = self._shape.latent
        if latent is None:
            raise RuntimeError("a layer without latents")
        self._read = LatentHeads(weight, latent.heads, latent.value_dim)
        return self._read


def _is_plain(projection: Any) -> bool:
    """Whether a module does nothing but multiply with its weight, which lies there."""
    hooks = (projection._forward_hooks, projection._forward_pre_hooks)
    plain = type(projection) is torch.nn.Linear and not any(hooks)
    return plain and not hasattr(projection, "_hf_hook") and not projection.weight.is_meta


def latent_modules(model: Any, shapes: Sequence[LayerShape]) -> dict[int, Any]:
    """Return the attention modules of the layers that cache latents, by layer.

    Raises:
        UnsupportedError: a module is not built as expected; says what.
    """
    wanted = {i: s.latent for i, s in enumerate(shapes) if s.latent is not None and s.latent.cached}
    found: dict[int, Any] = {
        module.layer_idx: module
        for module in model.modules()
        if hasattr(module, _EXPAND) and getattr(module, "layer_idx", None) in wanted
    }
    for index, latent in wanted.items():
        projection: Any = getattr(found.get(index), "kv_b_proj", None)
        outputs = latent.heads * (latent.key_dim - latent.rotary + latent.value_dim)
        sizes = [getattr(projection, name, None) for name in ("in_features", "out_features")]
        if sizes != [latent.rank, outputs] or projection.bias is not None:
            raise UnsupportedError(
                f"{type(model).__name__} cannot run under a KV budget: layer {index} expands its "
                f"latents in another way than by a kv_b_proj from {latent.rank} to {outputs} "
                "numbers without bias"
            )
    return found


def check_latents(attention: str, model: Any, shapes: Sequence[LayerShape]) -> None:
    """Refuse what cannot read latents.

    Args:
        attention: name of the backend.
        model: a transformers model.
        shapes: its layers.

    Raises:
        UnsupportedError: says why, and what to use instead.
    """
    if latent_modules(model, shapes) and attention == "triton":
        raise UnsupportedError(
            f"attention='triton' cannot read the latents of {type(model).__name__} (MLA), which "
            "are wider than a head: use attention='sdpa' or 'auto'"
        )
