"""The calibrated files that an arm reads: named in its parts, or given as the run's profile."""

from __future__ import annotations

from dataclasses import replace

from reasonalloc.allocators.layer import LAYER_ALLOCATORS, LayerAllocator
from reasonalloc.calibrated import ReadsCalibrated
from reasonalloc.calibrated.costs import load_costs
from reasonalloc.calibrated.shipped import find_shipped
from reasonalloc.config import Arm, CompressionConfig
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.policies import POLICIES, Policy


def readers(arm: Arm) -> dict[str, ReadsCalibrated]:
    """Return the parts of an arm that read a file, by the name of the part."""
    parts = {"policy": POLICIES.create(arm.policy), "layers": LAYER_ALLOCATORS.create(arm.layers)}
    return {name: part for name, part in parts.items() if isinstance(part, ReadsCalibrated)}


def files_missing(arm: Arm) -> dict[str, str]:
    """Return the kind of file of every part that reads one and does not name it."""
    return {name: part.reads for name, part in readers(arm).items() if not part.path}


def files_read(config: CompressionConfig) -> list[str]:
    """Return the paths of the files that the parts of an arm read."""
    parts = (part.with_file(config.profile) for part in readers(config.arm).values())
    return [part.path for part in parts if part.path]


def with_shipped(config: CompressionConfig, config_hash: str) -> CompressionConfig:
    """Return the settings with the package's own file for an architecture, if none was named.

    Args:
        config: the settings.
        config_hash: of the model, see ``calibrated.demand.config_hash``.
    """
    kinds = set() if config.profile is not None else set(files_missing(config.arm).values())
    if len(kinds) != 1:
        return config
    path = find_shipped(kinds.pop(), config_hash)
    return config if path is None else replace(config, profile=path)


def make_policy(config: CompressionConfig) -> Policy:
    """Return the policy of a run with its file, not yet bound to a model."""
    policy = POLICIES.create(config.arm.policy)
    return policy.with_file(config.profile) if isinstance(policy, ReadsCalibrated) else policy


def make_layer_allocator(config: CompressionConfig) -> LayerAllocator:
    """Return the layer allocator of a run with its file."""
    layers = LAYER_ALLOCATORS.create(config.arm.layers)
    return layers.with_file(config.profile) if isinstance(layers, ReadsCalibrated) else layers


def check_profile(config: CompressionConfig) -> None:
    """Refuse a profile that nothing reads, or that two parts would read as different files.

    Raises:
        UsageError: as said, or an unknown policy or layer allocator.
    """
    parts, arm = readers(config.arm), config.arm
    kinds = {part.reads for part in parts.values() if not part.path}
    if config.profile is None:
        return
    given = f"profile={str(config.profile)!r}"
    if not kinds:
        for name in parts:
            raise UsageError(f"{given} and {name}={getattr(arm, name)!r} both name a file")
        raise UsageError(
            f"{given} has no effect with policy={arm.policy!r} and layers={arm.layers!r}: use a "
            "part that reads a file (the presets 'best' and 'reasonalloc', or 'cake', "
            "'tri_attention' and others), or leave the profile out"
        )
    if len(kinds) > 1:
        raise UsageError(
            f"{given}: policy={arm.policy!r} and layers={arm.layers!r} read different kinds of "
            "files: name both in parentheses, as tri_attention(path=FILE) and profile(path=FILE)"
        )


def check_alike(config: CompressionConfig, name: str) -> None:
    """Refuse what counts on one shape of all layers under a budget.

    Args:
        config: the settings.
        name: of a model whose layers differ in shape.

    Raises:
        UnsupportedError: the budget is in bytes, and tokens are divided among the layers.
    """
    arm = config.arm
    if config.size is not None and str(arm.layers) != "uniform":
        raise UnsupportedError(
            f"budget={config.size.text!r}: layers={arm.layers!r} divides bytes among layers of "
            f"{name} that differ in shape: use layers='uniform', or give the budget in tokens"
        )


def other_cadence(config: CompressionConfig) -> str | None:
    """Return what to say if a cost profile has another cadence than the run, else None."""
    pins = "pin" if config.prompt == "pin" else "evict"
    run = _named(config.interval, config.window, pins)
    for part in readers(config.arm).values():
        path = part.with_file(config.profile).path
        if part.reads != "cost profile" or not path:
            continue
        costs = load_costs(path)
        own = _named(costs.interval, costs.window, costs.prompt)
        if own != run:
            return (
                f"the cost profile {path!r} was measured at {own}, this run has {run}: its "
                "budgets may not be the best ones, so use its settings or calibrate again"
            )
    return None


def _named(interval: int, window: int, prompt: str) -> str:
    return f"interval={interval}, window={window}, prompt={prompt}"
