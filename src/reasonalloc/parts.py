"""Policies and allocators of the user's own, for the processes that work for a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.allocators.layer import LAYER_ALLOCATORS
from reasonalloc.policies import POLICIES
from reasonalloc.registry import Registry

_REGISTRIES: dict[str, Registry[Any]] = {
    "policies": POLICIES,
    "layers": LAYER_ALLOCATORS,
    "heads": HEAD_ALLOCATORS,
}


def own_parts() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return what this process knows besides the library's, to be sent to another one.

    Classes that were defined in a notebook or a script need a pickler that writes them by value,
    such as Ray's.
    """
    return {kind: registry.own() for kind, registry in _REGISTRIES.items()}


def adopt_parts(parts: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """Make known what ``own_parts`` returned in another process."""
    for kind, (classes, objects) in parts.items():
        _REGISTRIES[kind].adopt(classes, objects)
