"""Everything that an arm can be made of, the attention backends and the tasks."""

from __future__ import annotations

import dataclasses
from typing import Any

from reasonalloc.config import PRESETS
from reasonalloc.registry import Registry


def known() -> dict[str, list[dict[str, Any]]]:
    """Return what there is, by kind, as plain JSON values; ``presets`` come last."""
    from reasonalloc.allocators.head import HEAD_ALLOCATORS
    from reasonalloc.allocators.layer import LAYER_ALLOCATORS
    from reasonalloc.attention.interface import BACKENDS
    from reasonalloc.evaluation.tasks.base import TASKS
    from reasonalloc.policies import POLICIES

    return {
        "policies": _entries(POLICIES),
        "layers": _entries(LAYER_ALLOCATORS),
        "heads": _entries(HEAD_ALLOCATORS),
        "attention": _entries(BACKENDS),
        "tasks": _entries(TASKS),
        "presets": [
            {"name": name, "arm": str(p.arm) if p.arm else None, "summary": p.summary}
            for name, p in PRESETS.items()
        ],
    }


def _entries(registry: Registry[Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": entry.name,
            "summary": entry.summary.replace("``", ""),
            "source": entry.source,
            "parameters": _parameters(entry.cls),
        }
        for entry in registry.entries().values()
    ]


def _parameters(cls: type[Any]) -> dict[str, Any]:
    """Return the default of each parameter."""
    if not dataclasses.is_dataclass(cls):
        return {}
    return {f.name: f.default for f in dataclasses.fields(cls) if f.init}
