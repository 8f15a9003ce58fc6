"""What code and values are, as a short text that is the same in another process."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from types import CodeType, FunctionType
from typing import Any

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_HIDDEN = {
    "__abstractmethods__",
    "__annotations__",
    "__dict__",
    "__doc__",
    "__firstlineno__",
    "__module__",
    "__static_attributes__",
    "__weakref__",
    "_abc_impl",
}


def fingerprint(value: Any) -> str:
    """Return 16 hex digits of a value: of a class or a function its code, of an object its state.

    Code includes constants, defaults, what a closure holds, base classes, and functions, classes
    and constants of the same module that it names. The library's own code is not looked at.
    Compiled code differs between releases of Python, and so do these digits.
    """
    return hashlib.sha256(_Text().of(value).encode()).hexdigest()[:16]


class _Text:
    def __init__(self) -> None:
        self._open: list[int] = []  # what is being described: code may name itself

    def of(self, value: Any) -> str:
        """Everything that decides what a value does."""
        if isinstance(value, _SIMPLE):
            return repr(value)
        if id(value) in self._open:
            return f"<{type(value).__name__} again>"
        self._open.append(id(value))
        try:
            return self._of(value)
        finally:
            self._open.pop()

    def _of(self, value: Any) -> str:
        if _is_tensor(value):
            data = value.detach().cpu()
            return f"{data.dtype} {data.tolist()}"
        if isinstance(value, Mapping):
            return f"{{{','.join(sorted(f'{self.of(k)}:{self.of(v)}' for k, v in value.items()))}}}"
        if isinstance(value, (set, frozenset)):
            return f"{{{','.join(sorted(map(self.of, value)))}}}"
        if isinstance(value, (list, tuple)):
            return f"({','.join(map(self.of, value))})"
        if isinstance(value, CodeType):
            return f"{value.co_code.hex()} {value.co_names} {self.of(value.co_consts)}"
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, (classmethod, staticmethod)):
            return self.of(value.__func__)
        if isinstance(value, property):
            return self.of((value.fget, value.fset))
        return self._class(value) if isinstance(value, type) else self._object(value)

    def _function(self, function: FunctionType) -> str:
        if _is_foreign(function.__module__):
            wrapped = getattr(function, "__wrapped__", None)
            return f"{function.__qualname__} {self.of(wrapped)}"
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(self.of(cell.cell_contents))
            except ValueError:  # not filled yet
                cells.append("<empty>")
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        used = {name: function.__globals__[name] for name in names if name in function.__globals__}
        own = {name: v for name, v in used.items() if self._belongs(v, function.__module__)}
        parts = (function.__code__, function.__defaults__, function.__kwdefaults__, own)
        return " ".join([*map(self.of, parts), *cells, self.of(vars(function).get("__wrapped__"))])

    @staticmethod
    def _belongs(value: Any, module: str | None) -> bool:
        if isinstance(value, (FunctionType, type)):
            return value.__module__ == module
        return _is_tensor(value) or isinstance(value, (*_SIMPLE, list, tuple, dict, set, frozenset))

    def _class(self, cls: type[Any]) -> str:
        if _is_foreign(cls.__module__):
            return f"{cls.__module__}.{cls.__qualname__}"
        own = {name: v for name, v in vars(cls).items() if name not in _HIDDEN}
        own = {name: v for name, v in own.items() if not name.startswith("__dataclass_")}
        return f"{cls.__name__} {self.of(own)} {','.join(map(self.of, cls.__bases__))}"

    def _object(self, value: Any) -> str:
        state = getattr(value, "__dict__", None)
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        if state:
            return f"{name} {self.of(state)}"
        text = repr(value)
        return name if " at 0x" in text else f"{name} {text}"


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # not loaded only to look
    return torch is not None and isinstance(value, torch.Tensor)


def _codes(code: CodeType) -> list[CodeType]:
    """A function's code, and that of the functions inside."""
    inner = [c for c in code.co_consts if isinstance(c, CodeType)]
    return [code, *(code for c in inner for code in _codes(c))]


def _is_foreign(module: str | None) -> bool:
    """Whether code belongs to a library whose release is noted elsewhere."""
    root = (module or "").partition(".")[0]
    return root in ("reasonalloc", "torch", "builtins", "abc", "typing", "dataclasses", "functools")
