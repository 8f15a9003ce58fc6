"""The output projections of a model's attention, as the metric of what its heads give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.hf.model import check_model
from reasonalloc.integrations.hf.sharding import find_shard

_NAMES = ("o_proj", "out_proj", "dense", "c_proj")


@torch.no_grad()
def output_metrics(model: Any) -> dict[int, Tensor]:
    """How far a change of a head's output moves the layer's output, by layer under a budget.

    Args:
        model: a transformers model with its weights.

    Returns:
        [kv_heads, value_dim, value_dim] float32 on the CPU: ``W^T W`` of the columns ``W`` of the
        output projection that belong to a query head, averaged over the KV head's group.

    Raises:
        UnsupportedError: a layer's output projection cannot be read, or is divided.
    """
    shapes, metrics = check_model(model), {}
    shard = find_shard(model, shapes)
    if shard.size > 1:
        raise UnsupportedError(
            f"metric='output' reads whole output projections, but this process holds one of "
            f"{shard.size} parts (tp_plan): use metric='value', or device_map"
        )
    if any(shape.latent is not None and shape.latent.cached for shape in shapes):
        raise UnsupportedError(
            f"metric='output' reads values of single heads, but {type(model).__name__} caches "
            "latents (MLA): use metric='value'"
        )
    weights = {
        module.layer_idx: weight
        for module in model.modules()
        if hasattr(module, "layer_idx") and (weight := _of(module)) is not None
    }
    for layer, shape in enumerate(shapes):
        if not shape.compressible:
            continue
        weight = weights.get(layer)
        if weight is None or weight.shape[1] % shape.query_heads:
            raise UnsupportedError(
                f"metric='output': the output projection of {type(model).__name__}'s layer {layer} "
                "is no plain matrix (quantised, or of an unknown name): use metric='value'"
            )
        heads = weight.float().unflatten(1, (shape.query_heads, -1))
        metric = torch.einsum("ohd,ohe->hde", heads, heads)
        metrics[layer] = metric.unflatten(0, (shape.kv_heads, -1)).mean(dim=1).cpu()
    return metrics


def _of(module: Any) -> Tensor | None:
    """[outputs, query_heads * value_dim] of an attention module."""
    for name in _NAMES:
        projection = getattr(module, name, None)
        if isinstance(projection, torch.nn.Linear) and projection.weight.is_floating_point():
            return projection.weight
    return None
