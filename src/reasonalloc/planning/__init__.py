"""A budget divided among layers, and the memory that it takes: known before the first token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reasonalloc.planning.budget import BudgetPlan, plan
    from reasonalloc.planning.memory import MemoryPlan

__all__ = ["BudgetPlan", "MemoryPlan", "plan"]


def __getattr__(name: str) -> Any:
    from reasonalloc.planning import budget

    if name in __all__:
        return getattr(budget, name)
    raise AttributeError(f"module 'reasonalloc.planning' has no attribute {name!r}")
