"""``reasonalloc ls``: everything that an arm can be made of, and the tasks."""

from __future__ import annotations

import dataclasses
from typing import Any

from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.config import PRESETS
from reasonalloc.registry import Registry

_TITLES = {
    "policies": "Policies: which tokens stay",
    "layers": "Layer allocators: how many tokens per layer",
    "heads": "Head allocators: how many tokens per KV head",
    "attention": "Attention backends (--attention)",
    "tasks": "Tasks of 'reasonalloc eval' (--task)",
}


def command(as_json: o.Json = False) -> None:
    """List policies, allocators, attention backends, tasks and presets with their parameters."""
    sections = _sections()
    presets = [
        {"name": name, "arm": str(p.arm) if p.arm else None, "summary": p.summary}
        for name, p in PRESETS.items()
    ]
    if as_json:
        output.print_json({**sections, "presets": presets})
        return
    console = output.stdout()
    for key, entries in sections.items():
        rows = [(e["name"], _described(e), e["source"]) for e in entries]
        columns = (("name", False), ("what it does", False), ("source", False))
        console.print(output.grid(columns, rows, _TITLES[key]))
        console.print()
    rows = [(str(p["name"]), p["arm"] or "-", str(p["summary"])) for p in presets]
    columns = (("name", False), ("arm", False), ("what it is", False))
    console.print(output.grid(columns, rows, "Presets"))
    console.print(
        "\nAn arm is a preset or policy/layers/heads; parameters go in parentheses: "
        "'rkv(lam=0.2)/pyramid/adakv'.",
        markup=False,
    )


def _sections() -> dict[str, list[dict[str, Any]]]:
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


def _described(entry: dict[str, Any]) -> str:
    values = ", ".join(f"{k}={v!r}" for k, v in entry["parameters"].items())
    return f"{entry['summary']}\n{values}" if values else str(entry["summary"])
