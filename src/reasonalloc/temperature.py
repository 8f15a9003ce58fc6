"""Sampling as users ask for it; light, so that what is wrong is refused before anything loads."""

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


def check_top_p(top_p: float) -> None:
    """Refuse what is no share of probability.

    Raises:
        UsageError: says what to give.
    """
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p={top_p} must be above 0 and at most 1 (1: all tokens)")


def check_effect(temperature: float, top_p: float | None = None, top_k: int | None = None) -> None:
    """Refuse what has no effect where the most likely token is taken.

    Args:
        temperature: 0: it is.
        top_p, top_k: as a user gave them; None: not at all.

    Raises:
        UsageError: says what to leave out.
    """
    for name, value, neutral in (("top_p", top_p, 1), ("top_k", top_k, 0)):
        if temperature == 0 and value is not None and value != neutral:
            raise UsageError(
                f"{name}={value} has no effect with temperature 0: leave it out, or give a "
                "temperature"
            )
