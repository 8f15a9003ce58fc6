"""Which KV heads of a model live in this process, under tensor parallelism."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reasonalloc.cache import LayerShape
from reasonalloc.errors import UnsupportedError


@dataclass(frozen=True)
class HeadShard:
    """The part of every layer's KV heads that one of ``size`` processes holds.

    Processes hold heads in their order, equally many each.
    """

    rank: int = 0
    size: int = 1

    def shape(self, shape: LayerShape) -> LayerShape:
        """A layer as this process sees it."""
        return dataclasses.replace(
            shape,
            kv_heads=shape.kv_heads // self.size,
            query_heads=shape.query_heads // self.size,
        )

    def total(self, total: int, planned: Sequence[int] | None, kv_heads: int) -> int:
        """This process's part of a layer's retained tokens; over all processes exactly ``total``.

        Args:
            total: of the layer.
            planned: tokens of each of its KV heads, if they are planned beforehand.
            kv_heads: of the layer, all processes together.
        """
        if planned is not None:
            return sum(self.heads(planned))
        equal, rest = divmod(total, kv_heads)
        return sum(self.heads([equal + (head < rest) for head in range(kv_heads)]))

    def heads(self, values: Sequence[int]) -> Sequence[int]:
        """The entries of this process's heads."""
        own = len(values) // self.size
        return values[self.rank * own : (self.rank + 1) * own]


def find_shard(model: Any, shapes: Sequence[LayerShape]) -> HeadShard:
    """How a model was divided by ``from_pretrained(tp_plan=...)``; one whole if it was not.

    Raises:
        UnsupportedError: the KV heads cannot be divided equally.
    """
    size = getattr(model, "tp_size", None) or 1
    plan = getattr(model, "tp_plan", None) or {}
    # Some plans gather fused projections again: every process then attends with all heads.
    divided = any(str(name).endswith("k_proj") and how == "colwise" for name, how in plan.items())
    if size == 1 or not divided:
        return HeadShard()
    heads = shapes[0].kv_heads
    if heads % size:
        raise UnsupportedError(
            f"tp_plan: {heads} KV heads cannot be divided among {size} processes under a KV "
            f"budget: start a number of them that divides {heads}"
        )
    mesh: Any = model._device_mesh
    named = "tp" in (mesh.mesh_dim_names or ())
    return HeadShard(mesh.get_local_rank("tp") if named else mesh.get_local_rank(), size)
