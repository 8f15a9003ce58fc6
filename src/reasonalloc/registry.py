"""Named implementations: those of the library, of installed packages, and the user's own.

One file and one ``@register`` adds one to the library; a package names its own by an entry point;
a class or an object that is handed over is known by its specification from then on.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from reasonalloc.errors import UsageError, unknown_name
from reasonalloc.fingerprint import fingerprint
from reasonalloc.whole import LARGEST

T = TypeVar("T")
_NONE = (dataclasses.MISSING, inspect.Parameter.empty)  # a parameter without a default
_NAME = re.compile(r"[A-Za-z0-9_\-]+")
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
    """Implementations of one kind, by name.

    Args:
        kind: what they are, for messages, such as ``policy``.
        package: whose modules are imported on first use: each registers what it defines.
        base: returns the class that all of them derive from; None: any class may register.
        group: of the entry points by which other packages add classes; None: they cannot.
    """

    def __init__(
        self,
        kind: str,
        package: str,
        base: Callable[[], type[T]] | None = None,
        group: str | None = None,
    ) -> None:
        self.kind = kind
        self._package, self._base, self._group = package, base, group
        self._entries: dict[str, Entry[T]] = {}
        self._objects: dict[str, T] = {}  # by specification, those that no text can describe
        self._broken: dict[str, str] = {}  # why what a package added is of no use
        self._loaded = False

    def register(self, name: str, *, source: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: make ``cls`` known as ``name``.

        A dataclass takes its fields as parameters, ``name(field=value)``; of any other class the
        parameters are those of its ``__init__`` that have a default.

        Raises:
            UsageError: the name belongs to another class, or cannot be written in an arm.
        """

        def add(cls: type[T]) -> type[T]:
            if not _NAME.fullmatch(name):
                raise UsageError(f"{self.kind} {name!r}: use letters, digits, _ and - alone")
            if not self._is_kind(cls):
                raise UsageError(f"{self.kind} {name!r}: {cls!r} is no class that can be made")
            old = self._entries.get(name)
            # A cell of a notebook that is run again defines its class anew.
            if old is not None and not _replaces(cls, old.cls):
                raise UsageError(f"{self.kind} {name!r} is registered twice: rename one of the two")
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
            self._load_packages()
        return dict(sorted(self._entries.items()))

    def _load_packages(self) -> None:
        for point in entry_points(group=self._group) if self._group else ():
            package = point.dist.name if point.dist else point.value
            of = f"{self.kind} {point.name!r} of the package {package}"
            try:
                cls = point.load()
            except Exception as error:  # whatever another package's code raises
                self._refuse(point.name, f"{of} cannot be imported ({error!r})")
                continue
            if not self._is_kind(cls):
                self._refuse(point.name, f"{of} is no {self.kind}, but {cls!r}")
            elif point.name not in self._entries:  # it may have registered itself
                self.register(point.name, source=package)(cls)

    def _refuse(self, name: str, reason: str) -> None:
        """Warn of a name that a package added in vain; whoever asks for it gets an error."""
        self._broken[name] = f"{reason}: repair or uninstall that package"
        warnings.warn(self._broken[name], stacklevel=2)

    def _is_kind(self, value: Any) -> bool:
        """Whether a value is a class of this kind that can be made."""
        base = None if self._base is None else self._base()
        is_class = isinstance(value, type) and not inspect.isabstract(value)
        return is_class and (base is None or issubclass(value, base))

    def create(self, spec: str) -> T:
        """Build from ``"name"`` or ``"name(value, key=value)"``.

        Raises:
            UsageError: unknown name or parameter, or a value of the wrong type.
        """
        match = _SPEC.match(spec) if isinstance(spec, str) else None
        if match is not None and spec in self._objects:
            return self._objects[spec]
        if match is None:
            raise UsageError(f"{self.kind} {spec!r} cannot be read: write name or name(key=value)")
        name, arguments = match.group(1), match.group(2)
        entries = self.entries()
        if name not in entries and name in self._broken:
            raise UsageError(self._broken[name])
        if name not in entries:
            raise unknown_name(self.kind, name, entries)
        cls = entries[name].cls
        values = _arguments(f"{self.kind} {name!r}", cls, arguments or "")
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{self.kind} {spec!r} cannot be made: {error}") from error

    def specification(self, value: str | T | type[T]) -> str:
        """The text that ``create`` makes an equal object of.

        Args:
            value: such a text, an object or a class of this kind. One that the library does not
                know is known from now on, by its name in small letters: ``MyPolicy`` is
                ``my_policy``.

        Raises:
            UsageError: neither, or a class whose name is taken.
        """
        if isinstance(value, str):
            return value
        cls = value if isinstance(value, type) else type(value)
        if not self._is_kind(cls):
            base = "the base class" if self._base is None else self._base().__name__
            raise UsageError(
                f"{value!r} is no {self.kind}: give a name (see 'reasonalloc ls'), or an object or "
                f"a class that derives from {base} and defines its abstract methods"
            )
        name = self._name_of(cls)
        if isinstance(value, type):
            return name
        shown = _parameters_of(value)
        if shown is not None:
            spec = f"{name}({shown})" if shown else name
            self._objects.pop(spec, None)
            return spec
        spec, number, state = name, 1, fingerprint(value)
        while type(old := self._objects.get(spec)) is cls and fingerprint(old) != state:
            number += 1
            spec = f"{name}-{number}"
        self._objects[spec] = value
        return spec

    def _name_of(self, cls: type[T]) -> str:
        entries = self.entries()
        for name, entry in entries.items():
            if entry.cls is cls:
                return name
        name = _small(cls.__name__)
        if name in entries and not _replaces(cls, entries[name].cls):
            raise UsageError(
                f"{self.kind} {cls.__qualname__}: {name!r} is another one's name: rename the "
                "class, or register it under a name of its own"
            )
        self.register(name, source=f"{cls.__module__}.{cls.__qualname__}")(cls)
        return name

    def own_class(self, spec: str) -> type[T] | None:
        """Return the class of a specification, if it is not the library's."""
        held = self._objects.get(spec)
        match = _SPEC.match(spec)
        entry = self._entries.get(match.group(1)) if match else None
        cls = type(held) if held is not None else entry.cls if entry else None
        return None if cls is None or is_builtin(cls) else cls

    def held(self, spec: str) -> T | None:
        """Return the object that a specification stands for, if text cannot describe it."""
        return self._objects.get(spec)

    def own(self, specs: Iterable[str]) -> tuple[dict[str, Entry[T]], dict[str, T]]:
        """Return what another process has to be told of to ``create`` these, see ``adopt``."""
        known = list(specs)
        classes = {self.own_class(spec) for spec in known}
        entries = {name: entry for name, entry in self._entries.items() if entry.cls in classes}
        return entries, {spec: self._objects[spec] for spec in known if spec in self._objects}

    def adopt(self, entries: Mapping[str, Entry[T]], objects: Mapping[str, T]) -> None:
        """Take over what ``own`` said in another process."""
        self.entries()
        self._entries.update(entries)
        self._objects.update(objects)


def is_builtin(cls: type[Any]) -> bool:
    """Whether a class is the library's own."""
    return cls.__module__.partition(".")[0] == __name__.partition(".")[0]


def _small(name: str) -> str:
    """``MyPolicy`` as ``my_policy``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _replaces(new: type[Any], old: type[Any]) -> bool:
    """Whether a class is an older one that was defined anew.

    A cell of a notebook that is run again does so. A function that makes classes makes several: of
    these each must have a name of its own.
    """
    if _place(new) != _place(old):
        return False
    return "<locals>" not in new.__qualname__ or fingerprint(new) == fingerprint(old)


def _place(cls: type[Any]) -> tuple[str, str]:
    """Where a class is defined: the same of one that is defined anew."""
    return cls.__module__, cls.__qualname__


def _fields(cls: type[Any]) -> dict[str, Any]:
    """Parameters by name, with their defaults."""
    if dataclasses.is_dataclass(cls):
        return {
            f.name: f.default_factory()
            if f.default is dataclasses.MISSING and f.default_factory is not dataclasses.MISSING
            else f.default
            for f in dataclasses.fields(cls)
            if f.init
        }
    if cls.__init__ is object.__init__:
        return {}
    given = list(inspect.signature(cls).parameters.values())
    return {p.name: p.default for p in given if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def _parameters_of(value: Any) -> str | None:
    """The parameters in parentheses that differ from the defaults; None if text cannot say them."""
    if not dataclasses.is_dataclass(value):
        return "" if not vars(value) and type(value).__init__ is object.__init__ else None
    if set(vars(value)) - {f.name for f in dataclasses.fields(value)} or "InitVar" in repr(
        getattr(type(value), "__annotations__", {})
    ):
        return None
    shown = []
    for name, default in _fields(type(value)).items():
        text = _as_text(getattr(value, name), type(default))
        if text is None:
            return None
        if text != _as_text(default, type(default)):
            shown.append(f"{name}={text}")
    return ", ".join(shown)


def _as_text(value: Any, kind: type[Any]) -> str | None:
    """A value as ``_convert`` reads it; None if it cannot."""
    if kind is bool or isinstance(value, bool):
        return str(value).lower() if kind is bool and isinstance(value, bool) else None
    if kind is float and isinstance(value, (int, float)) and math.isfinite(value):
        return repr(float(value))
    if kind is int and isinstance(value, int):
        return str(int(value))
    if kind is str and isinstance(value, str):
        return value if value == value.strip() and not set(value) & set(",()") else None
    return None


def _arguments(owner: str, cls: type[Any], text: str) -> dict[str, Any]:
    defaults = _fields(cls)
    names = list(defaults)
    values: dict[str, Any] = {}
    for index, part in enumerate(p.strip() for p in text.split(",") if p.strip()):
        key, equals, raw = part.partition("=")
        if not equals:
            if index >= len(names):
                raise UsageError(f"{owner} takes {len(names)} parameters, {part!r} is one more")
            key, raw = names[index], part
        key = key.strip()
        if key not in defaults:
            raise unknown_name(f"parameter of {owner}", key, defaults)
        if key in values:
            raise UsageError(f"{owner}: {key} is given twice")
        values[key] = _convert(owner, key, raw.strip(), type(defaults[key]))
    needed = [n for n, d in defaults.items() if n not in values and any(d is x for x in _NONE)]
    if needed:
        raise UsageError(f"{owner} needs {needed[0]}: give it in parentheses, or pass an object")
    return values


def _convert(owner: str, key: str, raw: str, kind: type[Any]) -> Any:
    if kind not in (bool, int, float, str):
        raise UsageError(f"{owner}: {key}={raw!r} cannot be given as text: pass an object")
    if kind is bool:
        if raw.lower() not in ("true", "false"):
            raise UsageError(f"{owner}: {key}={raw!r} must be true or false")
        return raw.lower() == "true"
    try:
        value = kind(raw)
        if kind is float and not math.isfinite(value):
            raise ValueError
    except ValueError:
        wanted = "a whole number" if kind is int else f"a finite {kind.__name__}"
        raise UsageError(f"{owner}: {key}={raw!r} must be {wanted}") from None
    if kind is int and abs(value) > LARGEST:
        raise UsageError(f"{owner}: {key}={raw} is too large: give at most {LARGEST}")
    return value
