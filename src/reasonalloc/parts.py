"""Policies and allocators of the user's own, for the processes that work for a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.allocators.layer import LAYER_ALLOCATORS
from reasonalloc.config import Arm
from reasonalloc.fingerprint import fingerprint
from reasonalloc.policies import POLICIES
from reasonalloc.registry import Registry

_REGISTRIES: dict[str, Registry[Any]] = {
    "policies": POLICIES,
    "layers": LAYER_ALLOCATORS,
    "heads": HEAD_ALLOCATORS,
}


def own_parts(arms: Iterable[Arm]) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return what arms are made of besides the library's, to be sent to another process.

    Classes that were defined in a notebook or a script need a pickler that writes them by value,
    such as Ray's.
    """
    known = list(arms)
    return {
        kind: registry.own(_parts(arm)[kind] for arm in known)
        for kind, registry in _REGISTRIES.items()
    }


def adopt_parts(parts: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """Make known what ``own_parts`` returned in another process."""
    for kind, (classes, objects) in parts.items():
        _REGISTRIES[kind].adopt(classes, objects)


def code_of(arm: Arm) -> str:
    """Return a fingerprint of the user's own parts of an arm: other code is another method.

    Nothing if all parts are the library's; see ``fingerprint`` for what counts.
    """
    texts = []
    for kind, spec in _parts(arm).items():
        registry = _REGISTRIES[kind]
        cls, held = registry.own_class(spec), registry.held(spec)
        texts += [] if cls is None else [fingerprint(cls)]
        texts += [] if held is None else [fingerprint(held)]
    return " ".join(texts)


def _parts(arm: Arm) -> dict[str, str]:
    return {"policies": arm.policy, "layers": arm.layers, "heads": arm.heads}
