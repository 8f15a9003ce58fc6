"""Which KV heads of a model live in this process, under tensor parallelism."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from reasonalloc.planning.memory import LayerShape

T = TypeVar("T")


@dataclass(frozen=True)
class HeadShard:
    """The part of every layer's KV heads that one of ``size`` processes holds.

    Processes hold heads in their order, equally many each.
    """

    rank: int = 0
    size: int = 1

    def shape(self, shape: LayerShape) -> LayerShape:
        """Return a layer as this process sees it."""
        return dataclasses.replace(
            shape,
            kv_heads=shape.kv_heads // self.size,
            query_heads=shape.query_heads // self.size,
        )

    def total(self, total: int, planned: Sequence[int] | None, kv_heads: int) -> int:
        """Return this process's part of a layer's retained tokens; all parts sum to ``total``.

        Args:
            total: of the layer.
            planned: tokens of each of its KV heads, if they are planned beforehand.
            kv_heads: of the layer, all processes together.
        """
        if planned is not None:
            return sum(self.heads(planned))
        equal, rest = divmod(total, kv_heads)
        return sum(self.heads([equal + (head < rest) for head in range(kv_heads)]))

    def heads(self, values: Sequence[T]) -> Sequence[T]:
        """Return the entries of this process's heads."""
        own = len(values) // self.size
        return values[self.rank * own : (self.rank + 1) * own]
