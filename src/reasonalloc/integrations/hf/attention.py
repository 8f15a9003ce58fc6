"""The attention and mask functions that are registered with transformers as ``reasonalloc``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from reasonalloc.attention.dense import attend, repeat_heads
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.integrations.hf.distance import added
from reasonalloc.integrations.hf.repeated import as_asked, in_groups, unrepeated
from reasonalloc.integrations.hf.slab_layer import layer_of
from reasonalloc.sinks import softmax

IMPLEMENTATION = "reasonalloc"
# Arguments of other attention features, which would be ignored silently; so would any tensor of
# numbers, see ``_check_arguments``.
_UNSUPPORTED = ("head_mask", "attention_sinks", "cache")
_ALWAYS_MASKED = ("mpt",)  # families that do something with a mask whether there is one or not
_NEEDLESS = "_reasonalloc_needless"


def register() -> None:
    """Make ``reasonalloc`` known to transformers; harmless when repeated."""
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_forward)


def mask_forward(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Mask over what the cache announces in ``get_mask_sizes``; see transformers' ``sdpa_mask``.

    A compressed layer announces the new tokens alone. For one such token nothing but its own
    validity matters: on a GPU that is passed on without looking, since looking would wait.
    """
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
    mask = _mask(*sizes, mask_function, attention_mask, **kwargs)
    family = getattr(kwargs.get("config"), "model_type", None)
    if mask is None and family in _ALWAYS_MASKED:
        mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=kwargs.get("device"))
        setattr(mask, _NEEDLESS, True)
    return mask


def is_needless(mask: Tensor) -> bool:
    """Whether a mask says nothing and was made only because a model cannot go without."""
    return getattr(mask, _NEEDLESS, False)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int,
    kv_offset: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Tensor | None:
    new_alone = kv_length == q_length and kwargs.get("local_size") is None
    if new_alone and attention_mask is not None and attention_mask.shape[-1] < kv_offset + q_length:
        raise UsageError(
            f"the attention mask covers {attention_mask.shape[-1]} tokens, but the cache has seen "
            f"{kv_offset} and {q_length} are new: pass a mask over all of them"
        )
    if new_alone and q_length == 1:
        if attention_mask is None:
            return None
        valid = attention_mask[:, kv_offset, None, None, None].bool()
        if valid.device.type == "cpu" and bool(valid.all()):
            return None
        return valid
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    return mask


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' interface.

    Keys that come from a compressed layer carry that layer; all others (sliding layers, a forward
    pass without a cache) are attended to as usual.

    Args:
        query: [batch, query_heads, q, head_dim]; key, value: [batch, kv_heads, n, head_dim].
        s_aux: [query_heads] learned sinks, or None; name as in transformers.
        position_bias: [batch, query_heads, q, n], added to the logits, or None; in a layer under a
            budget that of distances, see ``DistanceTable``.
        sinks: [batch, query_heads, q, 1] sinks of queries beside such a bias, or None.

    Returns:
        [batch, q, query_heads, head_dim] and no attention weights.
    """
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if position_bias is None and sinks is not None:
        kwargs["sinks"] = sinks  # which are not known alone
    _check_arguments(module, kwargs)
    _check_sinks(module, s_aux, query.shape[1], dropout)
    keys, values, copies = unrepeated(key, value)
    layer = layer_of(keys)
    if layer is not None:
        _check_training(module, dropout)
        heads = keys.shape[1]
        learned = None if s_aux is None else in_groups(s_aux, copies, heads, dim=0)
        own = [None if t is None else in_groups(t, copies, heads) for t in (position_bias, sinks)]
        query = in_groups(query, copies, heads)
        out = layer.attend(query, keys, values, attention_mask, scaling, softcap, learned, *own)
        out = as_asked(out, copies, heads)
        if torch.is_grad_enabled() and query.requires_grad and not layer.differentiable:
            out = _NoGradient.apply(out, query)  # type: ignore[no-untyped-call]
    elif position_bias is not None:
        _check_plain(module, softcap, s_aux, dropout)
        bias = _masked(added(module, position_bias, key.shape[2]), attention_mask)
        keys, values = (repeat_heads(tensor, query.shape[1]) for tensor in (key, value))
        logits = (query * scaling @ keys.transpose(-1, -2)).float() + bias
        weights = softmax(logits, None if sinks is None else sinks.squeeze(-1))
        out = weights.to(values.dtype) @ values
    elif softcap is not None or s_aux is not None:
        out = attend(query, key, value, attention_mask, scaling, softcap, s_aux)
    else:
        kwargs.pop("output_attentions", None)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return out.transpose(1, 2).contiguous(), None


def _masked(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Return a bias [batch, query_heads, q, n] that hides what a mask hides; None: the future."""
    queries, n = bias.shape[2:]
    bias = bias.float()
    if mask is None:
        mask = torch.ones(queries, n, dtype=torch.bool, device=bias.device).tril(n - queries)
    return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)


def _check_plain(
    module: torch.nn.Module, softcap: float | None, sinks: Tensor | None, dropout: float
) -> None:
    """Refuse what does not go together with a bias."""
    if softcap is not None or sinks is not None or dropout:
        raise UnsupportedError(
            f"{type(module).__name__} has a bias ('position_bias') beside soft-capping, sinks or "
            "dropout, which do not go together here: detach ReasonAlloc to run this model"
        )


def _check_arguments(module: torch.nn.Module, given: Mapping[str, Any]) -> None:
    """Refuse what would change the attention and is not known here."""
    for name, value in given.items():
        numbers = isinstance(value, Tensor) and value.is_floating_point()
        if numbers or (name in _UNSUPPORTED and value is not None):
            raise UnsupportedError(
                f"{type(module).__name__} passes {name!r} to its attention, which is not supported "
                "under a KV budget: detach ReasonAlloc to run this model"
            )


def _check_sinks(
    module: torch.nn.Module, sinks: Tensor | None, query_heads: int, dropout: float
) -> None:
    """Refuse sinks that are not one logit for each query head, or that would not be heard of."""
    name = type(module).__name__
    if sinks is None:
        if isinstance(getattr(module, "sinks", None), Tensor):
            raise UnsupportedError(
                f"{name} has learned sinks, which it does not pass to its attention as 's_aux': "
                "detach ReasonAlloc to run this model"
            )
        return
    if sinks.shape != (query_heads,):
        raise UnsupportedError(
            f"{name} has learned sinks of shape {list(sinks.shape)} for {query_heads} query heads, "
            "but one of each is supported: detach ReasonAlloc to run this model"
        )
    if dropout:
        raise UnsupportedError(
            f"{name} has learned sinks and attention dropout {dropout}, which do not go together "
            "here: call model.eval(), or detach ReasonAlloc"
        )


def _check_training(module: torch.nn.Module, dropout: float) -> None:
    """Refuse to train through a cache; generating in training mode, as RL does, works."""
    if not module.training:
        return
    check_gradients()
    if dropout:
        raise UnsupportedError(
            f"the model is in training mode with attention dropout {dropout}, which a KV budget "
            "does not do: call model.eval() before generate() and model.train() after it"
        )


def check_gradients() -> None:
    """Refuse to record gradients in training mode.

    Raises:
        UnsupportedError: says what to call.
    """
    if torch.is_grad_enabled():
        raise UnsupportedError(
            "a compressed cache cannot be trained through: call model.eval(), or leave "
            "the cache out"
        )


class _NoGradient(torch.autograd.Function):
    """Passes a result on, and says so when somebody asks for its gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, query: Tensor) -> Tensor:
        """See ``torch.autograd.Function``."""
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Refused."""
        raise UnsupportedError(
            "gradients cannot pass through a compressed cache: call the model with use_cache=False"
        )
