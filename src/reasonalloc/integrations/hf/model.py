"""What of a transformers model matters here, and why some models cannot work."""

from __future__ import annotations

import inspect
from typing import Any

from transformers import PreTrainedModel

from reasonalloc.errors import NothingToBudget, UnsupportedError
from reasonalloc.integrations.hf.inline import computes_inline
from reasonalloc.integrations.hf.states import check_hybrid
from reasonalloc.planning.memory import LayerShape
from reasonalloc.planning.shapes import layer_shapes, text_config


def end_tokens(model: Any) -> list[int]:
    """Token ids that end a generation; none if the model has none."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return ends if isinstance(ends, list) else [ends]


def inner_model(model: Any) -> Any:
    """The transformers model inside a PEFT model; any other model as it is.

    Raises:
        UnsupportedError: an adapter that learns tokens (prefix or prompt tuning).
    """
    if not hasattr(model, "get_base_model") or not hasattr(model, "peft_config"):
        return model
    check_adapter(model)
    return model.get_base_model()


def decoder_of(model: Any) -> Any:
    """Return the decoder inside a model that reads tokens and the cache; it may be the model."""
    found = model.get_decoder()
    if not isinstance(found, PreTrainedModel):  # ModernBERT's output layer has that name
        found = model.base_model
    return model if found is None else found


def check_adapter(model: Any) -> None:
    """Refuse a PEFT model that puts tokens of its own in front of the text.

    Raises:
        UnsupportedError: names the kind of adapter.
    """
    config = getattr(model, "active_peft_config", None)
    if config is not None and getattr(config, "is_prompt_learning", False):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UnsupportedError(
            f"a PEFT adapter of type {kind} puts learned tokens into the cache, which cannot run "
            "under a KV budget: use another kind of adapter, such as LoRA"
        )


def check_model(model: Any) -> tuple[LayerShape, ...]:
    """Shapes of a model's layers.

    Raises:
        UnsupportedError: it cannot work, with the reason.
        NothingToBudget: it is no decoder with causal attention, or has no cache.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"{name} is no transformers model: attach to the model inside, before wrapping or "
            "compiling it"
        )
    if getattr(model.config, "is_encoder_decoder", False):  # its decoder alone does not say so
        raise NothingToBudget(
            f"{name} cannot run under a KV budget: it is an encoder-decoder model, only "
            "decoder-only models work"
        )
    shapes = layer_shapes(text_config(model), name)
    check_cached(type(model))
    if not hasattr(model, "generate"):
        raise UnsupportedError(f"{name} has no generate(): load it with AutoModelForCausalLM")
    check_hybrid(shapes, name)
    _check_causal(model, name)
    able = type(model)._can_set_attn_implementation()  # newer ones no longer say it themselves
    able = able or getattr(model, "_supports_attention_backend", False)
    if not computes_inline(model) and (not able or _attends_alone(model)):
        raise UnsupportedError(
            f"{name} cannot run under a KV budget: its attention does not go through transformers' "
            "AttentionInterface"
        )
    return shapes


def _attends_alone(model: Any) -> bool:
    """Whether the modules that read the cache compute a softmax of their own.

    transformers may say that a model takes any attention because its vision tower does (GIT).
    """
    kinds = {type(module) for module in model.modules() if hasattr(module, "layer_idx")}
    used = [_used_names(kind) for kind in kinds]
    own = [names for names in used if {"update", "softmax"} <= names]
    return bool(own) and not any("ALL_ATTENTION_FUNCTIONS" in names for names in used)


def _used_names(kind: type) -> set[str]:
    """Names that the methods of a class use."""
    codes = [
        getattr(inspect.unwrap(f), "__code__", None) for f in vars(kind).values() if callable(f)
    ]
    return {name for code in codes if code is not None for name in code.co_names}


def check_cached(kind: type[Any]) -> None:
    """Refuse a class of models whose ``forward`` takes no cache of keys and values.

    Raises:
        NothingToBudget: says so.
    """
    known = inspect.signature(kind.forward).parameters
    anything = any(one.kind is one.VAR_POSITIONAL for one in known.values())
    if not anything and not {"cache", "past_key_values"} & set(known):
        raise NothingToBudget(
            f"{kind.__name__} cannot run under a KV budget: it takes no cache of keys and values"
        )


def _check_causal(model: Any, name: str) -> None:
    """Refuse a model whose attention modules all look ahead, such as BERT with an LM head."""
    layers = [module for module in model.modules() if hasattr(module, "layer_idx")]
    causal = [module.is_causal for module in layers if hasattr(module, "is_causal")]
    encodes = getattr(model.config, "is_decoder", None) is False
    known_by_module = bool(causal) and not any(causal)
    if known_by_module or (encodes and hasattr(model.config, "add_cross_attention")):
        remedy = ": set is_decoder=True" if encodes else ""
        raise NothingToBudget(
            f"{name} cannot run under a KV budget: its attention is not causal{remedy}"
        )
