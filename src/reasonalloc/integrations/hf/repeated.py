"""Models that repeat the heads of a cache before attention: all heads in turn, once per expert."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

_TAG = "_reasonalloc_repeated"


class Repeat:
    """Stands for ``repeat`` of keys or values that a cache handed on, and notes what it repeats.

    Args:
        handed: [batch, kv_heads, q, width].
    """

    def __init__(self, handed: Tensor) -> None:
        self._handed = weakref.ref(handed)  # which keeps this object

    def __call__(self, *sizes: Any) -> Tensor:
        """As ``torch.Tensor.repeat``."""
        handed = self._handed()
        if handed is None:
            raise RuntimeError("the tensor to be repeated is gone")
        result = Tensor.repeat(handed, *sizes)
        own, new = handed.shape, result.shape
        if new[1] % own[1] == 0 and (new[0], new[2:]) == (own[0], own[2:]):
            setattr(result, _TAG, handed)
        return result


def follow(*handed: Tensor) -> None:
    """Note from now on how these keys and values are repeated."""
    for tensor in handed:
        setattr(tensor, "repeat", Repeat(tensor))  # noqa: B010 (the type has a method of that name)


def unrepeated(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return keys and values as a cache handed them on, and how often all heads were repeated.

    Args:
        key: [batch, copies * kv_heads, q, head_dim], where head ``i`` is ``i % kv_heads`` of the
            cache if it was repeated; value: likewise.
    """
    keys, values = getattr(key, _TAG, None), getattr(value, _TAG, None)
    if keys is None or values is None or key.shape[1] != value.shape[1]:
        return key, value, 1
    return keys, values, key.shape[1] // keys.shape[1]


def in_groups(heads: Tensor, copies: int, kv_heads: int, dim: int = 1) -> Tensor:
    """Return query heads so that those of one cached KV head are neighbours.

    Args:
        heads: [..., query_heads, ...], in the order of ``copies`` times ``kv_heads`` heads.
        copies, kv_heads: how the heads of the cache were repeated.
        dim: of the query heads.
    """
    if copies == 1:
        return heads
    order: Tensor = heads.unflatten(dim, (copies, kv_heads, -1))
    return order.transpose(dim, dim + 1).flatten(dim, dim + 2)


def as_asked(heads: Tensor, copies: int, kv_heads: int) -> Tensor:
    """Return outputs, [batch, query_heads, q, value_dim] as ``in_groups``, in the model's order."""
    return in_groups(heads, kv_heads, copies) if copies > 1 else heads
