"""``reasonalloc ls``: everything that an arm can be made of, and the tasks."""

from __future__ import annotations

from typing import Any

from reasonalloc.cli import options as o
from reasonalloc.cli import output

_TITLES = {
    "policies": "Policies: which tokens stay",
    "layers": "Layer allocators: how many tokens per layer",
    "heads": "Head allocators: how many tokens per KV head",
    "attention": "Attention backends (--attention)",
    "tasks": "Tasks of 'reasonalloc eval' (--task)",
}


def command(as_json: o.Json = False) -> None:
    """List policies, allocators, attention backends, tasks and presets with their parameters."""
    from reasonalloc.diagnose.known import known

    sections = known()
    if as_json:
        output.print_json(sections)
        return
    console = output.stdout()
    for key, title in _TITLES.items():
        rows = [(e["name"], _described(e), e["source"]) for e in sections[key]]
        columns = (("name", False), ("what it does", False), ("source", False))
        console.print(output.grid(columns, rows, title))
        console.print()
    rows = [(p["name"], p["arm"] or "-", p["summary"]) for p in sections["presets"]]
    columns = (("name", False), ("arm", False), ("what it is", False))
    console.print(output.grid(columns, rows, "Presets"))
    console.print(
        "\nAn arm is a preset or policy/layers/heads; parameters go in parentheses: "
        "'rkv(lam=0.2)/pyramid/adakv'.",
        markup=False,
    )


def _described(entry: dict[str, Any]) -> str:
    values = ", ".join(f"{k}={v!r}" for k, v in entry["parameters"].items())
    return f"{entry['summary']}\n{values}" if values else str(entry["summary"])
