"""The output projections of a model's attention, as the metric of what its heads give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.hf.model import check_model
from reasonalloc.integrations.hf.sharding import find_shard
from reasonalloc.outputs import output_metric, projections


def output_metrics(model: Any) -> dict[int, Tensor]:
    """How far a change of a head's output moves the layer's output, by layer under a budget.

    Args:
        model: a transformers model with its weights.

    Returns:
        [kv_heads, value_dim, value_dim] float32 on the CPU: ``W^T W`` of the columns ``W`` of the
        output projection that belong to a query head, averaged over the KV head's group, in
        all layers that read it.

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
    if any(shape.paired for shape in shapes):
        raise UnsupportedError(
            f"metric='output' reads values of single heads, but in {type(model).__name__} "
            "two heads read each other's: use metric='value'"
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
        runs = layer if shape.again is None else shape.again
        readers = [weights[own] for own in (runs, *shape.readers) if own in weights]
        heads = shape.query_heads // (1 + len(shape.readers))
        if len(readers) <= len(shape.readers) or any(w.shape[1] % heads for w in readers):
            raise UnsupportedError(
                f"metric='output': the output projection of {type(model).__name__}'s layer {layer} "
                "is no plain matrix (quantised, or of an unknown name): use metric='value'"
            )
        metrics[layer] = output_metric(readers, heads, shape.kv_heads)
    return metrics


def _of(module: Any) -> Tensor | None:
    """[outputs, query_heads * value_dim] of an attention module."""
    for projection in projections(module):
        if isinstance(projection, torch.nn.Linear) and projection.weight.is_floating_point():
            return projection.weight
    return None
