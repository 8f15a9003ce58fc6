"""Intervals for measured shares."""

from __future__ import annotations

import math

#: 97.5 % quantile of the standard normal distribution: two-sided 95 %.
Z95 = 1.959963984540054


def wilson(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a share, both ends within [0, 1].

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22
    (1927), equation for the limits without continuity correction. It stays sensible where the
    normal approximation does not: few trials, and shares of 0 or 1.

    Args:
        successes: how many of the trials succeeded.
        trials: how many there were, at least 1.
        z: normal quantile of the wanted coverage.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials give no share")
    share, shrink = successes / trials, z * z / trials
    centre = (share + shrink / 2) / (1 + shrink)
    spread = z / (1 + shrink) * math.sqrt((share * (1 - share) + shrink / 4) / trials)
    low = 0.0 if successes == 0 else centre - spread
    high = 1.0 if successes == trials else centre + spread
    return low, high
