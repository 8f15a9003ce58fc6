"""Named implementations, imported on first use: one file and one ``@register`` adds one."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from reasonalloc.errors import UsageError, unknown_name

T = TypeVar("T")
_SPEC = re.compile(r"^\s*([A-Za-z0-9_\-]+)\s*(?:\((.*)\))?\s*$", re.DOTALL)


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered class with the line and the source that ``reasonalloc ls`` shows."""

    name: str
    cls: type[T]
    source: str

    @property
    def summary(self) -> str:
        """First line of the class's docstring."""
        return (inspect.getdoc(self.cls) or "").split("\n", 1)[0]


class Registry(Generic[T]):
    """Implementations of one kind, found by importing every module of ``package`` on first use."""

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, Entry[T]] = {}
        self._loaded = False

    def register(self, name: str, *, source: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: make ``cls`` (a frozen dataclass) known as ``name``."""

        def add(cls: type[T]) -> type[T]:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = Entry(name, cls, source)
            return cls

        return add

    def entries(self) -> dict[str, Entry[T]]:
        """All entries by name, in alphabetical order."""
        if not self._loaded:
            module = importlib.import_module(self._package)
            for info in pkgutil.iter_modules(module.__path__):
                importlib.import_module(f"{self._package}.{info.name}")
            self._loaded = True
        return dict(sorted(self._entries.items()))

    def create(self, spec: str) -> T:
        """Build from ``"name"`` or ``"name(value, key=value)"``.

        Raises:
            UsageError: unknown name or parameter, or a value of the wrong type.
        """
        match = _SPEC.match(spec)
        if match is None:
            raise UsageError(f"{self.kind} {spec!r} cannot be read: write name or name(key=value)")
        name, arguments = match.group(1), match.group(2)
        entries = self.entries()
        if name not in entries:
            raise unknown_name(self.kind, name, entries)
        cls = entries[name].cls
        return cls(**_arguments(f"{self.kind} {name!r}", cls, arguments or ""))


def _arguments(owner: str, cls: type[Any], text: str) -> dict[str, Any]:
    fields = [f for f in dataclasses.fields(cls) if f.init]
    by_name = {f.name: f for f in fields}
    values: dict[str, Any] = {}
    for index, part in enumerate(p.strip() for p in text.split(",") if p.strip()):
        key, equals, raw = part.partition("=")
        if not equals:
            if index >= len(fields):
                raise UsageError(f"{owner} takes {len(fields)} parameters, {part!r} is one more")
            key, raw = fields[index].name, part
        key = key.strip()
        if key not in by_name:
            raise unknown_name(f"parameter of {owner}", key, by_name)
        if key in values:
            raise UsageError(f"{owner}: {key} is given twice")
        values[key] = _convert(owner, key, raw.strip(), type(by_name[key].default))
    return values


def _convert(owner: str, key: str, raw: str, kind: type[Any]) -> Any:
    if kind is bool:
        if raw.lower() not in ("true", "false"):
            raise UsageError(f"{owner}: {key}={raw!r} must be true or false")
        return raw.lower() == "true"
    try:
        value = kind(raw)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except ValueError:
        wanted = "a whole number" if kind is int else f"a finite {kind.__name__}"
        raise UsageError(f"{owner}: {key}={raw!r} must be {wanted}") from None
