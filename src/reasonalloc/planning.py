"""A budget divided among a model's layers, and the memory that it takes: known beforehand."""

from __future__ import annotations

import os
from typing import Any

from reasonalloc.allocators.layer import LAYER_ALLOCATORS, LayerQuery
from reasonalloc.cache import LayerShape, MemoryPlan
from reasonalloc.config import CompressionConfig
from reasonalloc.errors import UsageError
from reasonalloc.policies import POLICIES
from reasonalloc.profiles import config_hash


def layer_totals(
    config: CompressionConfig, shapes: tuple[LayerShape, ...], model_config: Any, name: str
) -> tuple[int, ...]:
    """Retained tokens of every layer under a budget, all its KV heads together.

    Args:
        config: settings of the run.
        shapes: all attention layers of the model.
        model_config: the model's text configuration.
        name: the model's name, for messages.
    """
    budgeted = [shape for shape in shapes if shape.compressible]
    spec = config.arm.layers
    allocator = LAYER_ALLOCATORS.create(spec)
    if config.profile is not None:
        if getattr(allocator, "path", None):
            raise UsageError(
                f"profile={str(config.profile)!r} and layers={spec!r} both name a file"
            )
        spec = spec.partition("(")[0]
        allocator = type(allocator)(**{**vars(allocator), "path": os.fspath(config.profile)})
    query = LayerQuery(
        layers=len(budgeted),
        kv_heads=budgeted[0].kv_heads,
        budget=config.budget,
        window=config.window,
        n_sink=config.n_sink,
        model_id=name,
        config_hash=config_hash(model_config.to_dict()),
    )
    totals = allocator.allocate(query)
    if sum(totals) != query.total or len(totals) != query.layers or min(totals) < query.least:
        raise RuntimeError(f"layer allocator {spec!r} broke its contract: {totals}")
    return tuple(totals)


def compression_points(
    total: int, kv_heads: int, interval: int, prompt: int, steps: int
) -> list[int]:
    """When a layer is compressed while one sequence is prefilled and then decoded alone.

    In a batch the same events happen to a sequence, besides some that leave it as it is.

    Args:
        total: tokens that the layer keeps after a compression, all KV heads together.
        kv_heads: KV heads of the layer.
        interval: decode steps between two boundaries.
        prompt: tokens of the prompt.
        steps: decode steps after it; the last generated token is not among them.

    Returns:
        Tokens of the sequence at each compression, rising.
    """
    points, held = [], 0
    for seen in range(prompt, prompt + steps + 1, interval):
        held += kv_heads * (prompt if seen == prompt else interval)
        if held > total:
            points.append(seen)
            held = total
    return points


def plan_memory(
    config: CompressionConfig,
    shapes: tuple[LayerShape, ...],
    totals: tuple[int, ...],
    batch: int,
    itemsize: int,
) -> MemoryPlan:
    """Exact bytes of a cache for ``batch`` sequences; ``itemsize`` is bytes of one number."""
    policy = POLICIES.create(config.arm.policy)
    return MemoryPlan(
        shapes=shapes,
        totals=totals,
        batch=batch,
        interval=config.interval,
        window=config.window,
        itemsize=itemsize,
        keeps_queries=policy.needs_queries,
        keeps_attention=policy.needs_attention,
    )
