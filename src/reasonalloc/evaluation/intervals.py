"""Intervals for what was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

#: 97.5 % quantile of the standard normal distribution: two-sided 95 %.
Z95 = 1.959963984540054


def wilson(successes: float, trials: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval for a share, both ends within [0, 1].

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22
    (1927), equation for the limits without continuity correction. It stays sensible where the
    normal approximation does not: few trials, and shares of 0 or 1.

    Args:
        successes: how many of the trials succeeded.
        trials: how many there were, at least 1; need not be whole (an effective number).
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


def clustered_wilson(shares: Sequence[float], trials: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval for the mean of per-cluster shares, at the effective number of trials.

    Samples of one problem resemble each other, so they count for less than as many samples of
    different problems. The effective number is that at which a binomial share has the variance
    that the clusters' mean has (E. L. Korn and B. I. Graubard, Survey Methodology 24, 1998). It
    lies between the number of clusters and ``trials``; one trial per cluster gives ``wilson``.

    Args:
        shares: one number in [0, 1] per cluster; clusters weigh the same.
        trials: all trials together, at least one per cluster.
        z: normal quantile of the wanted coverage.

    Raises:
        ValueError: no clusters, fewer trials than clusters, or a share outside of [0, 1].
    """
    clusters = len(shares)
    if not 1 <= clusters <= trials or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"{clusters} clusters with {trials} trials give no share")
    mean = math.fsum(shares) / clusters
    spread = mean * (1 - mean)
    variance = math.fsum((share - mean) ** 2 for share in shares) / clusters
    # Clusters that all succeed or all fail tell nothing about how alike their samples are.
    effective = float(clusters)
    if spread > 0:
        effective = trials if variance == 0 else min(spread * clusters / variance, trials)
    effective = max(effective, clusters)
    return wilson(min(mean * effective, effective), effective, z)


def mean_interval(shares: Sequence[float], trials: int) -> tuple[float, float]:
    """95 % interval of the mean of per-cluster shares: ``clustered_wilson``.

    With Student's t where a variance between clusters was estimated, else the normal quantile: no
    more trials of clusters that all succeed or all fail may widen an interval.

    Args:
        shares: one number in [0, 1] per cluster.
        trials: all trials together.
    """
    estimated = trials > len(shares) > 1 and 0 < math.fsum(shares) < len(shares)
    quantile = student_quantile(len(shares) - 1) if estimated else Z95
    return clustered_wilson(shares, trials, quantile)


def student_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t with so many degrees of freedom, at least 1.

    Bisection of the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """

    def inside(value: float) -> float:
        """Chance that |t| is below ``value``."""
        angle = math.atan(value / math.sqrt(freedom))
        step = math.cos(angle) ** 2
        odd = freedom % 2
        term = math.cos(angle) if odd else 1.0
        terms = [term] if freedom > 1 else []
        for index in range(3 if odd else 2, freedom - 1, 2):
            term *= step * (index - 1) / index
            terms.append(term)
        series = math.sin(angle) * math.fsum(terms)
        return 2 / math.pi * (angle + series) if odd else series

    low, high = Z95, 13.0  # of 1 degree of freedom: 12.71
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return high


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
    top, bottom = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (sums, counts))
    picks = torch.randint(0, len(sums), (draws, len(sums)), generator=generator, device="cpu")
    ratios = top[picks].sum(1) / bottom[picks].sum(1)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64, device="cpu")
    low, high = torch.quantile(ratios, ends).tolist()
    return low, high
