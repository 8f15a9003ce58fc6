"""The layers of a model and what their caches hold, read from its configuration alone."""

from __future__ import annotations

from typing import Any

from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.planning.memory import LayerShape
from reasonalloc.planning.per_layer import layer_config, layer_heads, share, sources
from reasonalloc.planning.states import state_shape

#: Names of layers in older configurations.
_LEGACY = {"attention": "full_attention", "mamba": "linear_attention"}
_STATES = ("linear_attention", "conv", "hybrid")
_EMPTY = ("moe", "mlp", "dummy")  # layers without any cache
#: The field with the tokens that a layer keeps at most, by the type of the layer.
_BOUNDS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


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
        UnsupportedError: an encoder-decoder, latent attention (MLA), states of an
            unknown form, or no layer that sees everything; says which.
    """

    def refuse(reason: str) -> UnsupportedError:
        return UnsupportedError(f"{name} cannot run under a KV budget: {reason}")

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder model, only decoder-only models work")
    layers = getattr(config, "num_hidden_layers", None)
    first = layer_config(config, 0) if isinstance(layers, int) else config
    if getattr(first, "kv_lora_rank", None):
        raise refuse("it uses multi-head latent attention (MLA), which has no per-head keys")
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    if bidirectional not in (None, False, "vision") or not getattr(config, "is_causal", True):
        raise refuse("its attention is not causal")
    if not isinstance(layers, int) or not isinstance(
        getattr(first, "num_attention_heads", None), int
    ):
        raise refuse("its configuration does not give the number of layers and attention heads")
    shapes: list[LayerShape] = []
    kinds = _layer_types(config, layers)
    for index, kind in enumerate(kinds):
        if kind not in ("full_attention", *_BOUNDS, *_STATES, *_EMPTY):
            raise refuse(f"layer {index} is of type {kind!r}, which is not known")
        state = state_shape(config, kind) if kind in _STATES else None
        if kind in _STATES and state is None:
            raise refuse(f"layer {index} is of type {kind!r} and keeps a state of an unknown form")
        own = layer_config(config, index)
        if skipped := getattr(own, "skip", None):
            raise refuse(f"layer {index} skips {', '.join(skipped)}")
        heads = (0, 0, 0)
        if kind not in (*_EMPTY, "linear_attention", "conv"):
            heads = layer_heads(config, index, kind)
            if (values := getattr(own, "v_head_dim", None)) not in (None, heads[2]):
                raise refuse(f"v_head_dim={values}: its values have another width than its keys")
        window = getattr(own, _BOUNDS[kind]) if kind in _BOUNDS else None
        shapes.append(LayerShape(*heads, window, state))
    shapes = share(shapes, sources(config, kinds, refuse))
    if not any(shape.compressible for shape in shapes):
        if not any(shape.kv_heads for shape in shapes):
            raise refuse("it has no attention layer, so its cache does not grow")
        most = max(shape.sliding_window or 0 for shape in shapes)
        raise refuse(
            f"every layer keeps {most} tokens at most (sliding window, chunks), so its cache is "
            "bounded already"
        )
    return tuple(shapes)


def _layer_types(config: Any, layers: int) -> list[str]:
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if types is not None:
        return [_LEGACY.get(kind, kind) for kind in types]
    if getattr(config, "sliding_window", None) is not None:
        return ["sliding_attention"] * layers
    if getattr(config, "attention_chunk_size", None) is not None:
        return ["chunked_attention"] * layers
    return ["full_attention"] * layers
