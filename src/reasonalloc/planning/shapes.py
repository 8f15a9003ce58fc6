"""The layers of a model and what their caches hold, read from its configuration alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from reasonalloc.errors import NothingToBudget, UnsupportedError, UsageError
from reasonalloc.planning import inline
from reasonalloc.planning.latents import LatentShape, latent_shape
from reasonalloc.planning.memory import LayerShape
from reasonalloc.planning.per_layer import layer_config, layer_heads, looped, share, sources
from reasonalloc.planning.states import state_shape

#: Names of layers in older configurations.
_LEGACY = {"attention": "full_attention", "mamba": "linear_attention"}
_STATES = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
_INDEXED = (
    "an indexer chooses the tokens that attention sees by a key of every token, which a budget "
    "would evict"
)
_EMPTY = ("moe", "mlp", "dummy")  # layers without any cache
#: The field with the tokens that a layer keeps at most, by the type of the layer.
_BOUNDS = {
    "sliding_attention": "sliding_window",
    "hybrid_sliding": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}


def text_config(model: Any) -> Any:
    """Return the decoder's text configuration of a model or of a configuration.

    Raises:
        UsageError: it is neither.
    """
    config = getattr(model, "config", model)
    if not hasattr(config, "get_text_config"):
        raise UsageError(
            f"model={model!r} is no transformers model: give one, its configuration, or a name"
        )
    return config.get_text_config(decoder=True)


def model_name(model: Any) -> str:
    """Return the name of a model or of a configuration, for messages."""
    return getattr(getattr(model, "config", model), "_name_or_path", "") or type(model).__name__


def layer_shapes(config: Any, name: str) -> tuple[LayerShape, ...]:
    """Return the shapes of all layers, read from a model's (text) configuration.

    Raises:
        UnsupportedError: an indexer, latent attention (MLA) of an unknown form, states of
            an unknown form, loops that share caches, or no layer that sees everything; says which.
        NothingToBudget: an encoder-decoder, an encoder, a model without attention, or one whose
            layers all keep a fixed number of tokens.
    """

    def refuse(reason: str, kind: type[UnsupportedError] = UnsupportedError) -> UnsupportedError:
        return kind(f"{name} cannot run under a KV budget: {reason}")

    _check_attention(config, refuse)
    layers = getattr(config, "num_hidden_layers", None)
    first = layer_config(config, 0) if isinstance(layers, int) else config
    query_heads = getattr(first, "num_attention_heads", None)
    if not isinstance(layers, int) or not isinstance(query_heads, int):
        if layers and query_heads is None:
            raise refuse("it has no attention heads, so no KV cache grows", NothingToBudget)
        if len(parts := _parts(config)) > 1:
            raise refuse(f"it is made of several models ({', '.join(parts)}) that share no cache")
        raise refuse("its configuration does not give the number of layers and attention heads")
    latent = latent_shape(first, query_heads, refuse)
    kinds = _layer_types(config, layers)
    _check_growing(config, kinds, refuse)
    own = [_layer_shape(config, index, kind, latent, refuse) for index, kind in enumerate(kinds)]
    shared = share(own, sources(config, kinds, refuse))
    shapes = tuple(shared + looped(config, shared, refuse))
    if any(shape.compressible for shape in shapes):
        return shapes
    if not any(shape.kv_heads for shape in shapes):
        reason = "it has no attention layer, so its cache does not grow"
        raise refuse(reason, NothingToBudget)
    raise _bounded(max(shape.sliding_window or 0 for shape in shapes), refuse)


def _check_growing(
    config: Any, kinds: Sequence[str], refuse: Callable[..., UnsupportedError]
) -> None:
    """Refuse a model whose attention layers are all bounded, whatever its other layers keep."""
    others = ("linear_attention", "conv", *_EMPTY)
    bounds: list[int] = [
        _bound(layer_config(config, index), kind) if kind in _BOUNDS else 0
        for index, kind in enumerate(kinds)
        if kind not in others
    ]
    if bounds and all(bounds) and len(bounds) < len(kinds):
        raise _bounded(max(bounds), refuse, " with attention")


def _bounded(
    most: int, refuse: Callable[..., UnsupportedError], which: str = ""
) -> UnsupportedError:
    return refuse(
        f"every layer{which} keeps {most} tokens at most (sliding window, chunks), so its cache is "
        "bounded already",
        NothingToBudget,
    )


def _parts(config: Any) -> list[str]:
    """Return the models inside a model that have layers of their own, by name."""
    names = [name for name in getattr(config, "sub_configs", ()) if name.endswith("_config")]
    deep = [n for n in names if getattr(getattr(config, n, None), "num_hidden_layers", None)]
    return sorted(name.removesuffix("_config") for name in deep)


def _check_attention(config: Any, refuse: Callable[..., UnsupportedError]) -> None:
    """Refuse attention of a kind that has no keys of its own text, or chooses among them."""
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder model, only decoder-only models work"
        raise refuse(reason, NothingToBudget)
    both_ways = getattr(config, "use_bidirectional_attention", None)
    causal = getattr(config, "is_causal", True) and getattr(config, "causal", True)  # XLM
    if both_ways not in (None, False, "vision") or not causal:
        raise refuse("its attention is not causal", NothingToBudget)
    if getattr(config, "index_topk", None):
        raise refuse(f"index_topk={config.index_topk}: {_INDEXED}")
    if getattr(config, "keep_window_size", None) is not None:
        raise refuse(
            "its attention weighs every token by the values of all KV heads in the cache, of which "
            "each head would keep other tokens"
        )
    if 0 in (getattr(config, "cross_attention_layers", None) or ()):
        raise refuse("its first layer attends to an image, so no cache counts the tokens")
    if (getattr(config, "loop_num_passes", None) or 1) > 1:
        raise refuse("it runs some of its layers in loops, each with a cache of its own")
    if (own := inline.refusal(config)) is not None:
        raise refuse(own)


def _layer_shape(
    config: Any,
    index: int,
    kind: str,
    latent: LatentShape | None,
    refuse: Callable[..., UnsupportedError],
) -> LayerShape:
    """Return the shape of one layer, of a type such as ``full_attention``."""
    if kind not in ("full_attention", *_BOUNDS, *_STATES, *_EMPTY):
        if any(word in kind for word in ("index", "sparse", "compress")):
            raise refuse(f"layer {index} is of type {kind!r}: {_INDEXED}")
        raise refuse(f"layer {index} is of type {kind!r}, which is not known")
    without_keys = kind in (*_EMPTY, "linear_attention", "conv")
    heads = (0, 0, 0) if without_keys or latent is not None else layer_heads(config, index, kind)
    state = state_shape(config, kind, heads[0] * heads[2]) if kind in _STATES else None
    if kind in _STATES and state is None:
        raise refuse(f"layer {index} is of type {kind!r} and keeps a state of an unknown form")
    if without_keys:
        return LayerShape(0, 0, 0, None, state)
    if index in (getattr(config, "cross_attention_layers", None) or ()):
        return LayerShape(0, 0, 0, image=True)
    own = layer_config(config, index)
    if skipped := getattr(own, "skip", None):
        raise refuse(f"layer {index} skips {', '.join(skipped)}")
    if latent is not None:
        if kind != "full_attention":
            raise refuse(f"layer {index} is of type {kind!r} and uses latent attention (MLA)")
        return _latent_layer(latent)
    value_dim = getattr(own, "v_head_dim", None)
    window = _bound(own, kind) if kind in _BOUNDS else None
    other = None if value_dim == heads[2] else value_dim
    distances = 0 if window is not None else getattr(own, "rel_extent", None) or 0
    sinks = distances > 0 and hasattr(own, "rel_l2_clip_threshold")  # Inkling 2
    if getattr(config, "lambda_std_dev", None) is not None and heads[0] % 2 == 0:
        return LayerShape(heads[0] // 2, heads[1], 2 * heads[2], paired=True)
    shape = LayerShape(*heads, window, state, other, distances=distances, query_sinks=sinks)
    copies = (inline.kv_heads(own) or (heads[0], 1))[1]
    return dataclasses.replace(shape, bias=inline.bias_channels(own), copies=copies)


def _bound(config: Any, kind: str) -> int:
    """Return the tokens that a layer of a type with a bound sees at most."""
    own = getattr(config, "window_size", None) if inline.layer_types(config) else None
    return int(own or getattr(config, _BOUNDS[kind]))


def _latent_layer(latent: LatentShape) -> LayerShape:
    """Return a layer with latent attention, as its cache sees it."""
    if latent.cached:  # one vector per token, which all heads read
        return LayerShape(1, latent.heads, latent.numbers, value_dim=0, latent=latent)
    heads, key_dim, value_dim = latent.heads, latent.key_dim, latent.value_dim
    return LayerShape(heads, heads, key_dim, value_dim=value_dim, latent=latent)


def _layer_types(config: Any, layers: int) -> list[str]:
    """Return the type of each layer; of MiniMax's with a window, which no type says."""
    if (own := inline.layer_types(config)) is not None:
        return own
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if types is not None:
        named = dict(_LEGACY)
        if getattr(config, "model_type", "") == "minimax" and config.sliding_window is not None:
            named["full_attention"] = "sliding_attention"
        return [named.get(kind, kind) for kind in types]
    if getattr(config, "sliding_window", None) is not None:
        return ["sliding_attention"] * layers
    if getattr(config, "attention_chunk_size", None) is not None:
        return ["chunked_attention"] * layers
    return ["full_attention"] * layers
