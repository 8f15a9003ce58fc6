"""Which attention modules are stood for while a model has a KV budget."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.hf.inline import stands
from reasonalloc.planning.shapes import text_config

_FAMILIES: dict[str, type[stands.Stand]] = {
    "falcon.modeling_falcon.FalconAttention": stands.Falcon,
    "gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseAttention": stands.GPTNeoXJapanese,
    "xglm.modeling_xglm.XGLMAttention": stands.Decoder,
    "trocr.modeling_trocr.TrOCRAttention": stands.Decoder,
    "gpt_neo.modeling_gpt_neo.GPTNeoSelfAttention": stands.GPTNeo,
    "bloom.modeling_bloom.BloomAttention": stands.Bloom,
    "mpt.modeling_mpt.MptAttention": stands.Mpt,
}
_FORWARD = "forward"


def computes_inline(model: Any) -> bool:
    """Return whether a model's attention modules are of those that are stood for."""
    return text_config(model) is model.config and any(True for _ in _modules(model))


def inline_stands(model: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield modules of a model, and the attributes that stand for their own under a budget.

    Raises:
        UnsupportedError: a module has a ``forward`` that somebody else has put there.
    """
    if not computes_inline(model):
        return
    for module, stand in _modules(model):
        if _FORWARD in module.__dict__:
            raise UnsupportedError(
                f"{type(module).__name__} has a forward that is not its own (such as that of an "
                "offloaded model), which cannot run under a KV budget: load the model without it"
            )
        yield module, {_FORWARD: stand(module, model.config)}
    for module in model.modules():
        if getattr(module, "use_alibi", None) is True:  # Falcon would mix it into the mask
            yield module, {"use_alibi": False}


def _modules(model: Any) -> Iterator[tuple[Any, type[stands.Stand]]]:
    for module in model.modules():
        for kind in type(module).__mro__:
            name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("transformers.models.")
            if name in _FAMILIES:
                yield module, _FAMILIES[name]
                break


def set_attention(model: Any, implementation: Any) -> None:
    """Have a model use an attention implementation; see ``set_attn_implementation``.

    Models that compute attention themselves refuse that, but ask for it when they make masks.
    """
    if computes_inline(model):
        model.config._attn_implementation_internal = implementation
    else:
        model.set_attn_implementation(implementation)
