"""Numbers of calibrated files as text."""

from __future__ import annotations

from collections.abc import Sequence


def milli(cost: float) -> str:
    """Return nats as thousandths, with 3 digits at least."""
    return f"{1000 * cost:#.3g}" if cost < 0.1 else f"{1000 * cost:.0f}"


def spaced(budgets: Sequence[int], most: int = 5) -> list[int]:
    """Return budgets evenly from all of them, as many as a table has room for."""
    last = min(most, len(budgets)) - 1
    return [budgets[round(i * (len(budgets) - 1) / last)] for i in range(last + 1)]
