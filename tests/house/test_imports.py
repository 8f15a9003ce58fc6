"""No circle of files, and the rules of imports that need no tool to check."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

_SOURCE = Path(__file__).parents[2] / "src"


def names() -> dict[str, Path]:
    """Every module of the package and its file."""
    modules = {}
    for path in sorted(_SOURCE.rglob("*.py")):
        parts = path.relative_to(_SOURCE).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def imported(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that a file imports anywhere: inside functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                longer = f"{node.module}.{alias.name}"
                yield longer if longer in modules else str(node.module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def graph() -> dict[str, set[str]]:
    modules = names()
    return {
        module: {other for other in imported(path, modules) if other in modules} - {module}
        for module, path in modules.items()
    }


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that reach each other (Kosaraju)."""
    order: list[str] = []
    seen: set[str] = set()

    def visit(node: str, towards: dict[str, set[str]], out: list[str]) -> None:
        if node in seen:
            return
        seen.add(node)
        for other in sorted(towards[node]):
            visit(other, towards, out)
        out.append(node)

    for node in edges:
        visit(node, edges, order)
    back: dict[str, set[str]] = {node: set() for node in edges}
    for node, others in edges.items():
        for other in others:
            back[other].add(node)
    seen.clear()
    groups = []
    for node in reversed(order):
        group: list[str] = []
        visit(node, back, group)
        if len(group) > 1:
            groups.append(set(group))
    return groups


def test_circles_are_seen() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a", "d2"}, "d2": {"d"}}
    assert sorted(map(sorted, circles(edges))) == [["b", "c"], ["d", "d2"]]


def test_no_circle_of_files() -> None:
    edges = graph()
    assert len(edges) > 200
    assert circles(edges) == []


def test_nothing_but_the_entry_point_imports_the_command_line() -> None:
    for module, others in graph().items():
        if not module.startswith("reasonalloc.cli") and module != "reasonalloc.__main__":
            assert not [o for o in others if o.startswith("reasonalloc.cli")], module
