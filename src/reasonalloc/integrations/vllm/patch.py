"""One wrapped method of vLLM."""

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
    """One wrapped method.

    Attributes:
        where: ``module:Class.method``.
        needs: parameters that the wrapper relies on.
        wrap: takes the original, returns the wrapper.
    """

    where: str
    needs: tuple[str, ...]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]

    def apply(self) -> None:
        """Wrap the method, once.

        Raises:
            UnsupportedError: it is not there or has other parameters.
        """
        module, _, path = self.where.partition(":")
        owner_name, _, name = path.partition(".")
        owner = getattr(importlib.import_module(module), owner_name, None)
        original = getattr(owner, name, None)
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
        setattr(owner, name, wrapper)
