"""A budget divided among layers, and the memory that it takes: known before the first token."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reasonalloc.planning.budget import BudgetPlan
    from reasonalloc.planning.memory import MemoryPlan
    from reasonalloc.planning.model_plan import plan

__all__ = ["BudgetPlan", "MemoryPlan", "plan"]

#: Imported when they are asked for: ``--help`` needs none of them.
_MODULES = {"BudgetPlan": "budget", "MemoryPlan": "memory", "plan": "model_plan"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'reasonalloc.planning' has no attribute {name!r}")
