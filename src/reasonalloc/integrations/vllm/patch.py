"""One wrapped method or property of vLLM."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reasonalloc.errors import UnsupportedError

_MARK = "_reasonalloc_wrapped"


@dataclass(frozen=True)
class Patch:
    """One wrapped method, or property.

    Attributes:
        where: ``module:Class.method``.
        needs: parameters that the wrapper relies on.
        wrap: takes the original, returns the wrapper.
    """

    where: str
    needs: tuple[str, ...]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]

    def apply(self) -> None:
        """Wrap it, once.

        Raises:
            UnsupportedError: it is not there or has other parameters.
        """
        module, _, path = self.where.partition(":")
        owner_name, _, name = path.partition(".")
        owner = getattr(importlib.import_module(module), owner_name, None)
        found = inspect.getattr_static(owner, name, None)
        is_property = isinstance(found, property)
        original: Any = found.fget if isinstance(found, property) else getattr(owner, name, None)
        if original is None:
            raise UnsupportedError(f"this vLLM has no {self.where}: install a supported version")
        if getattr(original, _MARK, False):
            return
        parameters = inspect.signature(original).parameters
        if missing := [needed for needed in self.needs if needed not in parameters]:
            raise UnsupportedError(
                f"{self.where} of this vLLM has no parameter {missing[0]!r}: install a supported "
                "version"
            )
        wrapper = functools.wraps(original)(self.wrap(original))
        setattr(wrapper, _MARK, True)
        setattr(owner, name, property(wrapper) if is_property else wrapper)
