"""Policies and allocators of the user's own, for the processes that work for a run."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any

from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.allocators.layer import LAYER_ALLOCATORS
from reasonalloc.config import Arm
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
    """Return the code of the user's own classes in an arm: other code is another method.

    Nothing of the library's classes; the source of each own class, or its byte code where there is
    no source, such as in an interpreter.
    """
    own = (_REGISTRIES[kind].own_class(spec) for kind, spec in _parts(arm).items())
    return "".join(_source(cls) for cls in own if cls is not None)


def _parts(arm: Arm) -> dict[str, str]:
    return {"policies": arm.policy, "layers": arm.layers, "heads": arm.heads}


def _source(cls: type[Any]) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        functions = [f for f in vars(cls).values() if isinstance(f, FunctionType)]
        codes = [(f.__code__.co_code, f.__code__.co_names) for f in functions]
        return hashlib.sha256(repr(codes).encode()).hexdigest()
