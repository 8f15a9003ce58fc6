"""Families whose modules compute attention themselves: what only their configurations say so."""

from __future__ import annotations

from typing import Any

#: Channels that a key has besides its own, for the bias of its position (ALiBi). One is the same in
#: every key: what queries have there takes the bias of their own position away.
_FROM_BIAS = 3  # the bias itself, once for either part of the factor that queries have for it
_FROM_POSITION = 5  # the position in two parts, once for either part of the slope
_TYPES = {"global": "full_attention", "local": "sliding_attention"}


def kv_heads(config: Any) -> tuple[int, int] | None:
    """Return the KV heads of a layer and how often the model's own cache holds each; None: usual.

    Args:
        config: transformers' configuration of the decoder.
    """
    if getattr(config, "model_type", None) != "falcon":
        return None
    if config.new_decoder_architecture:  # expanded before they are cached
        return config.num_kv_heads, config.num_attention_heads // config.num_kv_heads
    return (1 if config.multi_query else config.num_attention_heads), 1


def bias_channels(config: Any) -> int:
    """Return how many channels of a key say where it stands; 0 if attention has no such bias."""
    family = getattr(config, "model_type", None)
    if family == "bloom" or (family == "falcon" and config.alibi):
        return _FROM_BIAS
    return _FROM_POSITION if family == "mpt" else 0


def layer_types(config: Any) -> list[str] | None:
    """Return the types of all layers, if their names are the family's own; None: usual."""
    if getattr(config, "model_type", None) != "gpt_neo":
        return None
    return [_TYPES.get(name, name) for name in config.attention_layers]


def refusal(config: Any) -> str | None:
    """Return why a configuration cannot run under a budget, or None."""
    family = getattr(config, "model_type", None)
    shared = family == "falcon" and (config.multi_query or config.new_decoder_architecture)
    if shared and config.alibi:
        return "its query heads share keys, but each has a bias of its own (ALiBi) that is rounded"
    if family == "cpmant":
        return (
            "its attention adds a learned number for every distance of two tokens, and each call "
            "reads the whole text"
        )
    return None
