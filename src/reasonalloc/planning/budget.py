"""A budget divided among a model's layers, and the memory that it takes: known beforehand."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.allocators.layer import LAYER_ALLOCATORS, LayerAllocator, LayerQuery
from reasonalloc.calibrated.costs import load_costs
from reasonalloc.calibrated.demand import config_hash
from reasonalloc.config import Arm, CompressionConfig
from reasonalloc.errors import UsageError
from reasonalloc.planning.memory import LayerShape, MemoryPlan
from reasonalloc.policies import POLICIES, ModelFacts, Policy
from reasonalloc.policies.rotary import Rope
from reasonalloc.whole import whole_number

T = TypeVar("T")


def files_missing(arm: Arm) -> dict[str, str]:
    """Parts of an arm that read a calibrated file and do not name it, and its kind."""
    return {
        name: getattr(part, "reads", "profile")
        for name, part in _parts(arm).items()
        if getattr(part, "path", None) == ""
    }


def file_kind(path: str | os.PathLike[str]) -> str:
    """What a calibrated file is, as ``files_missing`` says it; its reader finds out the rest.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(f"profile {str(path)!r} cannot be read: {error.strerror}") from None
    except ValueError:
        return "statistics"  # the only one that is no JSON
    return "cost profile" if isinstance(data, dict) and data.get("kind") == "cost" else "profile"


def _parts(arm: Arm) -> dict[str, Policy | LayerAllocator]:
    return {"policy": POLICIES.create(arm.policy), "layers": LAYER_ALLOCATORS.create(arm.layers)}


def files_read(config: CompressionConfig) -> list[str]:
    """Paths of the calibrated files that the parts of an arm read."""
    parts = (_with_file(part, config.profile) for part in _parts(config.arm).values())
    return [path for part in parts if (path := getattr(part, "path", None))]


def other_cadence(config: CompressionConfig) -> str | None:
    """What to say if a cost profile was measured at another cadence than the run's, else None."""
    run = {"interval": config.interval, "window": config.window}
    for part in _parts(config.arm).values():
        made: Any = _with_file(part, config.profile)
        if getattr(made, "reads", None) != "cost profile" or not made.path:
            continue
        costs = load_costs(made.path)
        if (costs.interval, costs.window) != (config.interval, config.window):
            wanted = " and ".join(f"{name}={value}" for name, value in run.items())
            return (
                f"the cost profile {made.path!r} was measured at interval={costs.interval} and "
                f"window={costs.window}, this run has {wanted}: its budgets may not be the best "
                "ones, so use its cadence or calibrate again"
            )
    return None


def check_profile(config: CompressionConfig) -> None:
    """Refuse a profile that nothing reads, or that two parts would read as different files.

    Raises:
        UsageError: as said, or an unknown policy or layer allocator.
    """
    missing, arm = files_missing(config.arm), config.arm
    if config.profile is None:
        return
    given = f"profile={str(config.profile)!r}"
    if not missing:
        for name, part in _parts(arm).items():
            if getattr(part, "path", None):
                raise UsageError(f"{given} and {name}={getattr(arm, name)!r} both name a file")
        raise UsageError(
            f"{given} has no effect with policy={arm.policy!r} and layers={arm.layers!r}: use a "
            "part that reads a file (the presets 'best' and 'reasonalloc', or 'cake', "
            "'tri_attention' and others), or leave the profile out"
        )
    if len(set(missing.values())) > 1:
        raise UsageError(
            f"{given}: policy={arm.policy!r} and layers={arm.layers!r} read different kinds of "
            "files: name both in parentheses, as tri_attention(path=FILE) and profile(path=FILE)"
        )


def _with_file(part: T, profile: str | os.PathLike[str] | None) -> T:
    """A policy or allocator with the path that its specification leaves out."""
    if profile is None or getattr(part, "path", None) != "":
        return part
    made: Any = part
    found: T = dataclasses.replace(made, path=os.fspath(profile))
    return found


def bound_policy(
    config: CompressionConfig,
    shapes: tuple[LayerShape, ...],
    model_config: Any,
    name: str,
    load_rope: Callable[[], Rope] | None = None,
    load_output_metrics: Callable[[], dict[int, Tensor]] | None = None,
) -> Policy:
    """The policy of a run, checked against the model.

    Args:
        config, shapes, model_config, name: as for ``layer_totals``.
        load_rope, load_output_metrics: read the model's rotary embedding and output projections,
            see ``ModelFacts``; None while its weights are not loaded.
    """
    budgeted = [shape for shape in shapes if shape.compressible]
    facts = ModelFacts(
        model_id=name,
        config_hash=config_hash(model_config.to_dict()),
        layers=len(budgeted),
        query_heads=budgeted[0].query_heads,
        head_dim=budgeted[0].head_dim,
        load_rope=load_rope,
        load_output_metrics=load_output_metrics,
    )
    check_profile(config)
    return _policy(config).bind(facts)


def _policy(config: CompressionConfig) -> Policy:
    return _with_file(POLICIES.create(config.arm.policy), config.profile)


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
    allocator, query = _layer_query(config, shapes, model_config, name)
    totals = allocator.allocate(query)
    if sum(totals) != query.total or len(totals) != query.layers or min(totals) < query.least:
        raise RuntimeError(f"layer allocator {config.arm.layers!r} broke its contract: {totals}")
    return tuple(totals)


def planned_heads(
    config: CompressionConfig, shapes: tuple[LayerShape, ...], model_config: Any, name: str
) -> tuple[tuple[int, ...], ...] | None:
    """Tokens of every head, [layers][kv_heads], if the head allocator wants them beforehand.

    Arguments as for ``layer_totals``.

    Raises:
        UsageError: the layer allocator plans no heads.
    """
    if not HEAD_ALLOCATORS.create(config.arm.heads).needs_plan:
        return None
    allocator, query = _layer_query(config, shapes, model_config, name)
    plan = allocator.plan_heads(query)
    if plan is None:
        raise UsageError(
            f"heads={config.arm.heads!r} needs budgets per head, which layers="
            f"{config.arm.layers!r} does not plan: use layers='cost' or another head allocator"
        )
    return tuple(tuple(heads) for heads in plan)


def _layer_query(
    config: CompressionConfig, shapes: tuple[LayerShape, ...], model_config: Any, name: str
) -> tuple[LayerAllocator, LayerQuery]:
    budgeted = [shape for shape in shapes if shape.compressible]
    check_profile(config)
    allocator = _with_file(LAYER_ALLOCATORS.create(config.arm.layers), config.profile)
    return allocator, LayerQuery(
        layers=len(budgeted),
        kv_heads=budgeted[0].kv_heads,
        budget=config.budget,
        window=config.window,
        n_sink=config.n_sink,
        model_id=name,
        config_hash=config_hash(model_config.to_dict()),
    )


def plan_memory(
    config: CompressionConfig,
    shapes: tuple[LayerShape, ...],
    totals: tuple[int, ...],
    batch: int,
    itemsize: int,
) -> MemoryPlan:
    """Exact bytes of a cache for ``batch`` sequences; ``itemsize`` is bytes of one number.

    Raises:
        UsageError: ``batch`` is no whole number of at least 1.
    """
    policy = _policy(config).resolve()
    return MemoryPlan(
        shapes=shapes,
        totals=totals,
        batch=whole_number("batch", batch, 1),
        interval=config.interval,
        window=config.window,
        itemsize=itemsize,
        keeps_queries=policy.needs_queries,
        state_channels=policy.state_channels,
    )
