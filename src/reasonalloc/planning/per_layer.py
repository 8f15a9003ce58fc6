"""What configurations say of single layers: their heads, and whose cache they read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from reasonalloc.errors import NothingToBudget, UnsupportedError
from reasonalloc.planning import inline
from reasonalloc.planning.memory import LayerShape


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
    kv_heads = (inline.kv_heads(own) or (None, 1))[0]
    kv_heads = kv_heads or getattr(of_attention, "kv_n_heads", None)
    kv_heads = kv_heads or getattr(own, "num_key_value_heads", None) or query_heads
    head_dim = getattr(own, "head_dim", None) or own.hidden_size // query_heads
    if kind == "full_attention":  # Gemma 4, before transformers had configurations per layer
        head_dim = getattr(own, "global_head_dim", None) or head_dim
        if getattr(own, "attention_k_eq_v", False):
            kv_heads = getattr(own, "num_global_key_value_heads", None) or kv_heads
    elif kind == "hybrid_sliding" and hasattr(own, "swa_head_dim"):  # Inkling
        return own.swa_num_key_value_heads, own.swa_num_attention_heads, own.swa_head_dim
    elif kind == "sliding_attention" and getattr(config, "model_type", "") == "mimo_v2_flash":
        kv_heads = 2 * kv_heads  # which no field says
    return kv_heads, query_heads, head_dim


def sources(
    config: Any, kinds: Sequence[str], refuse: Callable[..., UnsupportedError]
) -> dict[int, int]:
    """Return the layer whose cache each layer without an own one reads.

    The last ``num_kv_shared_layers`` layers read that of the last layer of their type before them
    (Gemma 3n, Gemma 4).

    Args:
        config: transformers' configuration of the decoder.
        kinds: type of each layer.
        refuse: makes an error of a reason.

    Raises:
        UnsupportedError: there is none.
        NothingToBudget: all layers read the cache of another model (assistants of Gemma 4).
    """
    first = len(kinds) - (getattr(config, "num_kv_shared_layers", None) or 0)
    if first <= 0:
        reason = "all of its layers read the cache of another model, and no layer of it has one"
        raise refuse(reason, NothingToBudget)
    last = {kind: layer for layer, kind in enumerate(kinds[:first])}
    for kind in set(kinds[first:]) - set(last):
        raise refuse(f"layers of type {kind!r} read a shared cache that no layer of it has")
    return {layer: last[kinds[layer]] for layer in range(first, len(kinds))}


def share(shapes: Sequence[LayerShape], read: dict[int, int]) -> list[LayerShape]:
    """Return layers as their caches see them, where some read the cache of others.

    Args:
        shapes: of all layers, as if each had its own cache.
        read: from ``sources``.
    """
    shared = list(shapes)
    for layer, source in read.items():
        owner = shared[source]
        shared[source] = dataclasses.replace(
            owner,
            query_heads=owner.query_heads + shapes[layer].query_heads,
            readers=(*owner.readers, layer),
        )
        shared[layer] = LayerShape(0, 0, 0, reads=source)
    return shared


def looped(
    config: Any, shapes: Sequence[LayerShape], refuse: Callable[[str], UnsupportedError]
) -> list[LayerShape]:
    """Return the further caches of layers that run several times, behind those of all layers.

    The caches of each loop after the first follow one another (Dory).

    Args:
        config: transformers' configuration of the decoder.
        shapes: of all layers.
        refuse: makes an error of a reason.

    Raises:
        UnsupportedError: loops read the cache of another loop.
    """
    loops = getattr(config, "n_recurrent_loops", None) or 1
    if loops == 1:
        return []
    if (mode := getattr(config, "recurrent_kv_cache_mode", None)) != "per_loop":
        raise refuse(
            f"recurrent_kv_cache_mode={mode!r}: earlier loops over its layers read what the last "
            "loop cached, before the new tokens are there"
        )
    first, count = config.n_input_layers, config.n_recurrent_layers
    once = [
        dataclasses.replace(shapes[layer], again=layer) for layer in range(first, first + count)
    ]
    return once * (loops - 1)
