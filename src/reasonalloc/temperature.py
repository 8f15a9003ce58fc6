"""Temperatures as users give them; light, so that a wrong one is refused before anything loads."""

from __future__ import annotations

import math

from reasonalloc.errors import UsageError

#: Logits divided by less than this leave the numbers of float32.
LEAST_TEMPERATURE = 1e-6


def check_temperature(temperature: float) -> None:
    """Refuse what logits cannot be divided by.

    Raises:
        UsageError: says what to give.
    """
    if temperature != 0 and not LEAST_TEMPERATURE <= temperature < math.inf:
        raise UsageError(
            f"temperature={temperature} must be 0 (greedy), or a number from "
            f"{LEAST_TEMPERATURE:g} on"
        )
