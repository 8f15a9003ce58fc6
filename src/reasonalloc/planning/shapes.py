"""The layers of a model and what their caches hold, read from its configuration alone."""

from __future__ import annotations

from typing import Any

from reasonalloc.errors import NothingToBudget, UnsupportedError, UsageError
from reasonalloc.planning.latents import LatentShape, latent_shape
from reasonalloc.planning.memory import LayerShape
from reasonalloc.planning.states import state_shape

#: Names of layers in older configurations.
_LEGACY = {"attention": "full_attention", "mamba": "linear_attention"}
_STATES = ("linear_attention", "conv", "hybrid")
_INDEXED = (
    "an indexer chooses the tokens that attention sees by a key of every token, which a budget "
    "would evict"
)
_EMPTY = ("moe", "mlp", "dummy")  # layers without any cache


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
        UnsupportedError: an indexer, latent attention (MLA) of an unknown form, shared layers,
            states of an unknown form, or no layer that sees everything; says which.
        NothingToBudget: an encoder-decoder, an encoder, or a model without attention.
    """

    def refuse(reason: str, kind: type[UnsupportedError] = UnsupportedError) -> UnsupportedError:
        return kind(f"{name} cannot run under a KV budget: {reason}")

    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder model, only decoder-only models work"
        raise refuse(reason, NothingToBudget)
    if getattr(config, "index_topk", None):
        raise refuse(f"index_topk={config.index_topk}: {_INDEXED}")
    if (getattr(config, "n_recurrent_loops", None) or 1) > 1:
        raise refuse("it runs some of its layers in loops, each with a cache of its own")
    if getattr(config, "cross_attention_layers", None):
        raise refuse("some of its layers attend to an image, not to the text")
    if getattr(config, "num_kv_shared_layers", 0):
        raise refuse("some of its layers share one KV cache")
    both_ways = getattr(config, "use_bidirectional_attention", None)
    if both_ways not in (None, False, "vision") or not getattr(config, "is_causal", True):
        raise refuse("its attention is not causal", NothingToBudget)
    layers = getattr(config, "num_hidden_layers", None)
    query_heads = getattr(config, "num_attention_heads", None)
    if getattr(config, "per_layer_attributes", None) or hasattr(config, "global_head_dim"):
        raise refuse("the shapes of its layers differ")
    if not isinstance(layers, int) or not isinstance(query_heads, int):
        if layers and query_heads is None:
            raise refuse("it has no attention heads, so no KV cache grows", NothingToBudget)
        raise refuse("its configuration does not give the number of layers and attention heads")
    kv_heads = _kv_heads(config) or query_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    latent = latent_shape(config, query_heads, refuse)
    shapes = []
    for index, kind in enumerate(_layer_types(config, layers)):
        if kind not in ("full_attention", "sliding_attention", *_STATES, *_EMPTY):
            if any(word in kind for word in ("index", "sparse", "compress")):
                raise refuse(f"layer {index} is of type {kind!r}: {_INDEXED}")
            raise refuse(f"layer {index} is of type {kind!r}, which is not known")
        state = state_shape(config, kind) if kind in _STATES else None
        if kind in _STATES and state is None:
            raise refuse(f"layer {index} is of type {kind!r} and keeps a state of an unknown form")
        heads = (kv_heads, query_heads, head_dim)
        if kind in _EMPTY or kind in ("linear_attention", "conv"):
            heads = (0, 0, 0)
        if latent is not None and kind in ("sliding_attention", "hybrid"):
            raise refuse(f"layer {index} is of type {kind!r} and uses latent attention (MLA)")
        if latent is not None and kind == "full_attention":
            shapes.append(_latent_layer(latent))
            continue
        window = config.sliding_window if kind == "sliding_attention" else None
        shapes.append(LayerShape(*heads, window, state))
    if not any(shape.compressible for shape in shapes):
        if not any(shape.kv_heads for shape in shapes):
            reason = "it has no attention layer, so its cache does not grow"
            raise refuse(reason, NothingToBudget)
        raise refuse(
            f"every layer has a sliding window of {config.sliding_window} tokens, so its cache is "
            "bounded already"
        )
    return tuple(shapes)


def _kv_heads(config: Any) -> int | None:
    of_attention = getattr(config, "attn_config", None)  # DBRX
    heads: int | None = getattr(of_attention, "kv_n_heads", None)
    return heads or getattr(config, "num_key_value_heads", None)


def _latent_layer(latent: LatentShape) -> LayerShape:
    """Return a layer with latent attention, as its cache sees it."""
    if latent.cached:  # one vector per token, which all heads read
        return LayerShape(1, latent.heads, latent.numbers, value_dim=0, latent=latent)
    heads, key_dim, value_dim = latent.heads, latent.key_dim, latent.value_dim
    return LayerShape(heads, heads, key_dim, value_dim=value_dim, latent=latent)


def _layer_types(config: Any, layers: int) -> list[str]:
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if types is not None:
        return [_LEGACY.get(kind, kind) for kind in types]
    if getattr(config, "sliding_window", None) is not None:
        return ["sliding_attention"] * layers
    if getattr(config, "attention_chunk_size", None) is not None:
        return ["chunked_attention"] * layers
    return ["full_attention"] * layers
