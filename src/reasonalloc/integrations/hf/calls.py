"""What every forward call of a model under a budget goes through first."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.integrations.hf.attention import IMPLEMENTATION, check_gradients
from reasonalloc.integrations.hf.budgeted import Budgeted
from reasonalloc.integrations.hf.cache import BudgetCache
from reasonalloc.integrations.hf.shift import give_shift, take_shift
from reasonalloc.integrations.hf.versions import cache_name, given_cache, with_cache


class CallCheck:
    """A forward pre-hook: gives a call a cache if it would make one, and tells the cache of it.

    Args:
        attachment: of the model.
        inner: whether the hook sits on the decoder inside the attached model.
        holder: see ``shift_holder``.
    """

    def __init__(self, attachment: Budgeted, inner: bool, holder: Any = None) -> None:
        self._attachment = attachment
        self._inner, self._holder = inner, holder

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See ``torch.nn.Module.register_forward_pre_hook``, ``with_kwargs=True``.

        Raises:
            UsageError: a cache that would not be compressed, another attention than the budget's,
                or a mask that cannot be honoured.
        """
        if args:
            names = list(inspect.signature(module.forward).parameters)
            kwargs, args = {**dict(zip(names, args, strict=False)), **kwargs}, ()
        cache = given_cache(kwargs)
        if cache is None:
            if not self._would_cache(module, kwargs):
                return None
            cache = self._attachment.new_cache()
        elif not isinstance(cache, BudgetCache):
            if not module.training:
                raise UsageError(
                    f"{cache_name()} is a {type(cache).__name__}, which would not be compressed: "
                    "pass a cache of this attachment (new_cache()), leave it out, or detach"
                )
            return None
        kwargs = with_cache(kwargs, cache)
        self._attachment.check_own(cache)
        check_attention(self._attachment)
        if module.training:
            check_gradients()
            check_checkpointing(module)
        self._announce(cache, kwargs)
        give_shift(self._holder, cache, kwargs)
        if self._inner and isinstance(kwargs.get("logits_to_keep"), int):
            kwargs["logits_to_keep"] = 0  # Gemma 4 would leave out queries of a shared cache
        return args, kwargs

    def _would_cache(self, module: Any, kwargs: dict[str, Any]) -> bool:
        """Whether the model would make a cache of its own, which is none to train with."""
        if module.training:
            return False
        asked = kwargs.get("use_cache")
        if asked is None:
            # A plain forward pass whose gradients may be wanted stays as it is.
            return bool(getattr(module.config, "use_cache", False)) and not torch.is_grad_enabled()
        return bool(asked)

    def _announce(self, cache: BudgetCache, kwargs: dict[str, Any]) -> None:
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        tokens = ids if isinstance(ids, Tensor) else embeds
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return  # the model refuses it
        batch, columns = tokens.shape[:2]
        known = tokens if tokens.dim() == 2 and not tokens.is_floating_point() else None
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):  # one per type of layer
            mask = mask.get("full_attention")
        if isinstance(mask, Tensor) and mask.dim() == 4:
            mask = _two_dimensional(mask, cache, batch, columns)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            mask = None
        cache.announce(known, batch, columns, mask, self._inner)


class CallEnd:
    """A forward hook: tells the cache that a call has ended, see ``BudgetCache.settle``.

    Args:
        holder: see ``shift_holder``.
    """

    def __init__(self, holder: Any = None) -> None:
        self._holder = holder

    def __call__(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """See ``torch.nn.Module.register_forward_hook``, ``with_kwargs=True``."""
        cache = given_cache(kwargs)
        if isinstance(cache, BudgetCache):
            cache.settle()
            take_shift(self._holder, cache)


def _two_dimensional(mask: Tensor, cache: BudgetCache, batch: int, columns: int) -> Tensor | None:
    """What a mask over the new tokens alone, [batch, 1, q, q] bool, says of the whole text."""
    if mask.dtype != torch.bool or mask.shape[-1] != columns:
        return None  # refused by the layers
    past = cache.seen.places(batch, mask.device) >= 0
    return torch.cat([past, mask[:, 0, -1].expand(batch, -1)], dim=1)


def check_attention(attachment: Budgeted) -> None:
    """Refuse a model whose attention was changed since it was attached.

    Raises:
        UsageError: says what to do.
    """
    implementation = attachment.implementation
    if implementation != IMPLEMENTATION:
        raise UsageError(
            f"the model's attention was set to {implementation!r} after attach(), so no budget "
            "is kept: detach, set it, then attach again"
        )


def check_checkpointing(model: Any) -> None:
    """Refuse gradient checkpointing in training mode.

    Raises:
        UnsupportedError: says what to call.
    """
    # Newer transformers have another name, and warn of this one.
    named = "activation" if hasattr(type(model), "is_activation_checkpointing") else "gradient"
    if model.training and getattr(model, f"is_{named}_checkpointing", False):
        raise UnsupportedError(
            "the model is in training mode with gradient checkpointing, for which transformers "
            f"switches the cache off: call model.{named}_checkpointing_disable() before "
            "generate() (as TRL's trainers do) and enable it after, or model.eval() and "
            "model.train()"
        )


class StepOfCache:
    """Stands for a model's ``forward``: a call runs as the step of its own cache says.

    Each ``generate`` call has a cache, and the cache its ``stepper``: calls of several threads do
    not meet.

    Args:
        forward: the model's own.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)  # generate() looks at the signature
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As ``forward``."""
        stepper = getattr(given_cache(kwargs), "stepper", None)
        return (self._forward if stepper is None else stepper)(*args, **kwargs)
