"""What configurations say of single layers: their heads."""

from __future__ import annotations

from typing import Any


def layer_config(config: Any, layer: int) -> Any:
    """Return a model's (text) configuration as one of its layers sees it."""
    per_layer = getattr(config, "per_layer_config", None)
    return config if per_layer is None or isinstance(per_layer, dict) else per_layer[layer]


def layer_heads(config: Any, layer: int, kind: str) -> tuple[int, int, int]:
    """Return KV heads, query heads and their width.

    Args:
        config: transformers' configuration of the decoder.
        layer: its index.
        kind: its type, such as ``full_attention``.
    """
    own = layer_config(config, layer)
    each = getattr(own, "num_attention_heads_per_layer", None)  # Laguna
    query_heads = each[layer] if each else own.num_attention_heads
    of_attention = getattr(own, "attn_config", None)  # DBRX
    kv_heads = getattr(of_attention, "kv_n_heads", None)
    kv_heads = kv_heads or getattr(own, "num_key_value_heads", None) or query_heads
    head_dim = getattr(own, "head_dim", None) or own.hidden_size // query_heads
    if kind == "full_attention":  # Gemma 4, before transformers had configurations per layer
        head_dim = getattr(own, "global_head_dim", None) or head_dim
        if getattr(own, "attention_k_eq_v", False):
            kv_heads = getattr(own, "num_global_key_value_heads", None) or kv_heads
    elif kind == "sliding_attention" and getattr(config, "model_type", "") == "mimo_v2_flash":
        kv_heads = 2 * kv_heads  # which no field says
    return kv_heads, query_heads, head_dim
