"""Models that take no cache but one of their own class, such as MiniMax's."""

from __future__ import annotations

import functools
import sys
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from reasonalloc.integrations.hf.cache import BudgetCache
from reasonalloc.integrations.hf.cache_layers import held_bytes
from reasonalloc.integrations.hf.model import decoder_of

_READ = "get_linear_cache"


def own_class(model: Any) -> Any:
    """The class of cache that a model wants, if that holds states of linear attention by layer.

    Returns:
        A subclass of transformers' ``DynamicCache``; None if the model takes any cache.
    """
    place = sys.modules.get(type(decoder_of(model)).__module__)
    for kind in vars(place).values() if place is not None else ():
        if isinstance(kind, type) and issubclass(kind, Cache) and hasattr(kind, _READ):
            return kind
    return None


def full_cache(model: Any) -> Any:
    """An empty cache of transformers' own, which keeps everything."""
    kind = own_class(model)
    return DynamicCache(config=model.config) if kind is None else kind()


def full_bytes(cache: Any) -> int:
    """Bytes that a cache of transformers' own holds for keys, values and states."""
    states = getattr(cache, "linear_cache", ())
    return held_bytes(cache.layers) + sum(s.nbytes for s in states if isinstance(s, Tensor))


class OwnBudgetCache(BudgetCache):
    """A cache under a budget that answers as a model's own class of cache does."""

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """State of a layer, [batch, heads, head_dim, head_dim], or None before the first token."""
        return self.get_recurrent_state(layer_idx)

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """Take over the new state of a layer; see ``get_linear_cache``."""
        self.update_recurrent_state(linear_cache, layer_idx)

    def __len__(self) -> int:
        """Layers of the model."""
        return len(self.layers)


@functools.cache
def budget_class(own: Any) -> type[BudgetCache]:
    """The class of a cache under a budget.

    Args:
        own: the class that the model wants, see ``own_class``; None if it takes any.
    """
    return BudgetCache if own is None else type(f"Budget{own.__name__}", (OwnBudgetCache, own), {})
