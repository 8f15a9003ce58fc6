"""Multi-head latent attention (MLA): what a token's latent is, and which cache would hold it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reasonalloc.errors import UnsupportedError

#: The first release of transformers that caches latents.
LATENTS_SINCE = "5.15"
_FIELDS = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")


@dataclass(frozen=True)
class LatentShape:
    """What a layer with latent attention makes of a token.

    Attributes:
        rank: width of the latent, from which the keys and values of all heads are computed.
        rotary: width of the rotary key that all heads share.
        heads: query heads; each has a key and a value of its own.
        key_dim, value_dim: widths of these.
        cached: whether the cache holds latents; else it holds the keys and values of every head.
    """

    rank: int
    rotary: int
    heads: int
    key_dim: int
    value_dim: int
    cached: bool

    @property
    def numbers(self) -> int:
        """Numbers of a token's latent and rotary key."""
        return self.rank + self.rotary

    @property
    def expanded_numbers(self) -> int:
        """Numbers of a token's keys and values of all heads."""
        return self.heads * (self.key_dim + self.value_dim)


def latent_shape(
    config: Any, heads: int, refuse: Callable[[str], UnsupportedError]
) -> LatentShape | None:
    """Return what the layers of a model make of a token, read from its (text) configuration.

    Args:
        config: transformers' configuration of the decoder.
        heads: query heads of a layer.
        refuse: makes an error of a reason.

    Returns:
        None if the attention of the model knows no latents.

    Raises:
        UnsupportedError: sizes are missing or do not fit, or the model's code is not part of
            transformers.
    """
    if not getattr(config, "kv_lora_rank", None):
        return None
    sizes = []
    for name in _FIELDS:
        size = getattr(config, name, None)
        if not isinstance(size, int) or size < 1:
            raise refuse(f"it uses latent attention (MLA), and its {name}={size!r} is no width")
        sizes.append(size)
    if (runs := getattr(config, "num_key_value_heads", None) or heads) != heads:
        raise refuse(
            f"it uses latent attention (MLA), in which every query head has a key, but its "
            f"num_key_value_heads={runs} differs from num_attention_heads={heads}: set them alike"
        )
    rank, rotary, plain, value = sizes
    return LatentShape(rank, rotary, heads, plain + rotary, value, _cached(config, refuse))


def _cached(config: Any, refuse: Callable[[str], UnsupportedError]) -> bool:
    """Return whether the attention of a family hands latents to its cache, or what they expand to.

    Older transformers expands them first. Attention that expands them later has a method for it.
    """
    home = type(config).__module__
    if not home.startswith("transformers.models."):
        raise refuse(
            "it uses latent attention (MLA) in code of its own, so what its cache holds is not "
            "known: load it without trust_remote_code"
        )
    package, _, name = home.rpartition(".")
    modeling = f"{package}.{name.replace('configuration', 'modeling')}"
    if importlib.util.find_spec(modeling) is None:  # a configuration of another family's model
        modeling = _home_of_model(config.model_type, refuse)
    kinds = vars(importlib.import_module(modeling)).values()
    return any(hasattr(kind, "expand_kv") for kind in kinds)


def _home_of_model(model_type: str, refuse: Callable[[str], UnsupportedError]) -> str:
    """Return the module of the causal language model that transformers loads for a model type."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if not isinstance(name, str):
        raise refuse(
            f"it uses latent attention (MLA), and transformers has no model for {model_type!r}"
        )
    home: str = getattr(transformers, name).__module__
    return home
