"""Intervals for what was measured."""

from __future__ import annotations

import math

import torch

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


def bootstrap_ratio(
    sums: list[float], counts: list[float], draws: int = 4000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of ``sum(sums) / sum(counts)``, resampling whole clusters, 95 %.

    B. Efron, "Bootstrap methods", Annals of Statistics 7 (1979). Tokens of one text are not
    independent, so texts are drawn, not tokens.

    Args:
        sums: one number per cluster, such as the summed divergence of a text.
        counts: one positive number per cluster, such as its tokens.
        draws: resamples.
        seed: of the draws; the same arguments give the same interval.

    Returns:
        Lower and upper end; both the estimate itself if there is one cluster.
    """
    generator = torch.Generator().manual_seed(seed)
    top, bottom = torch.tensor(sums).double(), torch.tensor(counts).double()
    picks = torch.randint(0, len(sums), (draws, len(sums)), generator=generator)
    ratios = top[picks].sum(1) / bottom[picks].sum(1)
    low, high = torch.quantile(ratios, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
