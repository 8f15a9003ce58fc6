"""How a transformers model was divided among processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reasonalloc.errors import UnsupportedError
from reasonalloc.planning.memory import LayerShape
from reasonalloc.planning.sharding import HeadShard


def find_shard(model: Any, shapes: Sequence[LayerShape]) -> HeadShard:
    """How a model was divided by ``from_pretrained(tp_plan=...)``; one whole if it was not.

    Raises:
        UnsupportedError: the KV heads cannot be divided equally, or layers keep states or latents.
    """
    size = getattr(model, "tp_size", None) or 1
    plan = getattr(model, "tp_plan", None) or {}
    # Some plans gather fused projections again: every process then attends with all heads.
    if size > 1 and any(shape.latent is not None for shape in shapes):
        raise UnsupportedError(
            "tp_plan: a model with latent attention (MLA) cannot be divided among processes under "
            "a KV budget: use device_map"
        )
    if size > 1 and any(shape.paired for shape in shapes):
        raise UnsupportedError(
            "tp_plan: a model whose KV heads read each other's values cannot be divided among "
            "processes under a KV budget: use device_map"
        )
    divided = any(str(name).endswith("k_proj") and how == "colwise" for name, how in plan.items())
    if size == 1 or not divided:
        return HeadShard()
    if any(not shape.kv_heads or shape.state for shape in shapes):
        raise UnsupportedError(
            "tp_plan: a model with linear, Mamba or convolution layers, or with layers that share "
            "a cache, cannot be divided among processes under a KV budget: do without tp_plan"
        )
    for heads in sorted({shape.kv_heads for shape in shapes}):
        if heads % size:
            raise UnsupportedError(
                f"tp_plan: {heads} KV heads cannot be divided among {size} processes under a KV "
                f"budget: start a number of them that divides {heads}"
            )
    mesh: Any = model._device_mesh
    named = "tp" in (mesh.mesh_dim_names or ())
    return HeadShard(mesh.get_local_rank("tp") if named else mesh.get_local_rank(), size)
