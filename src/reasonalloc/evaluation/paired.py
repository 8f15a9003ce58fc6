"""Arms compared on the same problems: is a difference more than noise, and what would settle it.

Needs scipy (extra ``report``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from reasonalloc.evaluation.intervals import bootstrap_ratio
from reasonalloc.evaluation.samples import Sample
from reasonalloc.evaluation.statistics import ALPHA, Estimate, by_problem

#: Chance with which a difference should show.
POWER = 0.8
#: What is compared, 0 or 1 per sample: attributes of ``Sample``, and what sentences call them.
QUANTITIES = {"correct": "", "cut": " cut at the limit", "went_on": " going on after the answer"}
#: Problems that must differ, all one way, before an exact two-sided test can show it: 2 / 2^6.
LEAST = 6


@dataclass(frozen=True)
class Paired:
    """An arm against the base arm on the problems that both have.

    Attributes:
        arm, budget, base, base_budget: what is compared.
        quantity: what is compared: ``correct``, ``cut`` or ``went_on``.
        problems: common problems.
        difference: of the share of samples (of ``correct``: pass@1), arm minus base, with a
            bootstrap interval over problems.
        better, worse: problems on which the arm's share is higher, lower; of ``cut`` and
            ``went_on`` lower, higher.
        test: ``McNemar, exact`` for one sample per problem, else ``sign flips``.
        p: two-sided; ``adjusted``: by Holm's method for all comparisons of a table.
        detectable: smallest difference that so many problems show with 80 % power; None if fewer
            than six problems differ, which says nothing about how much they vary.
        problems_needed: problems, at as many samples each, that would show the measured
            difference with 80 % power; None if the difference is 0.
        samples_needed: the same for samples per problem and arm, with the problems that are there;
            None if no number would do, or if one sample per problem cannot tell.
    """

    arm: str
    budget: int | str | None
    base: str
    base_budget: int | str | None
    problems: int
    difference: Estimate
    better: int
    worse: int
    test: str
    p: float
    adjusted: float
    detectable: float | None
    problems_needed: int | None
    samples_needed: int | None
    quantity: str = "correct"

    @property
    def clear(self) -> bool:
        """Whether the difference is more than noise, all comparisons considered."""
        return self.adjusted < ALPHA


def compare(
    arm: Sequence[Sample], base: Sequence[Sample], quantity: str = "correct"
) -> Paired | None:
    """Paired difference of a share on common problems; None if there are fewer than two.

    Args:
        arm, base: samples of two cells.
        quantity: one of ``QUANTITIES``.
    """
    pairs = _pairs(arm, base, quantity)
    if len(pairs) < 2:
        return None
    gaps = [_share(a) - _share(b) for a, b in pairs]
    mean = math.fsum(gaps) / len(gaps)
    mean = 0.0 if abs(mean) < 1e-12 else mean  # thirds do not cancel exactly
    better, worse = sum(g > 0 for g in gaps), sum(g < 0 for g in gaps)
    if quantity != "correct":
        better, worse = worse, better
    single = all(len(a) == len(b) == 1 for a, b in pairs)
    p = _mcnemar(better, worse) if single else _sign_flips(gaps)
    low, high = bootstrap_ratio(gaps, [1.0] * len(gaps))
    variance = math.fsum((g - mean) ** 2 for g in gaps) / (len(gaps) - 1)
    reach = _reach()
    return Paired(
        arm=arm[0].arm,
        budget=arm[0].budget,
        base=base[0].arm,
        base_budget=base[0].budget,
        problems=len(gaps),
        difference=Estimate(mean, low, high),
        better=better,
        worse=worse,
        test="McNemar, exact" if single else "sign flips",
        p=p,
        adjusted=p,
        detectable=reach * math.sqrt(variance / len(gaps)) if better + worse >= LEAST else None,
        problems_needed=_problems_needed(gaps, mean, variance, reach),
        samples_needed=None if mean == 0 else _samples_needed(pairs, mean, variance, reach),
        quantity=quantity,
    )


def _pairs(
    arm: Sequence[Sample], base: Sequence[Sample], quantity: str
) -> list[tuple[list[bool], list[bool]]]:
    """Marks of both arms' samples, for every common problem."""
    left, right = (
        {name: [getattr(s, quantity) for s in own] for name, own in by_problem(samples).items()}
        for samples in (arm, base)
    )
    return [(left[name], right[name]) for name in left if name in right]


def _share(marks: Sequence[bool]) -> float:
    return sum(marks) / len(marks)


def _reach() -> float:
    """Standard errors that a difference must have to show with the wanted power."""
    from scipy.stats import norm

    return float(norm.ppf(1 - ALPHA / 2) + norm.ppf(POWER))


def _mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p: Q. McNemar, Psychometrika 12 (1947), as a binomial test."""
    from scipy.stats import binomtest

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def _sign_flips(gaps: Sequence[float]) -> float:
    """Two-sided p of a paired permutation test: without an effect, a gap's sign is chance."""
    import numpy
    from scipy.stats import permutation_test

    moved = [gap for gap in gaps if gap != 0]  # flipping a 0 changes nothing
    if len(moved) < 2:  # one gap is as likely with the other sign
        return 1.0
    permuted = permutation_test(
        (numpy.array(moved),),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        rng=0,
    )
    return float(permuted.pvalue)


def _problems_needed(
    gaps: Sequence[float], mean: float, variance: float, reach: float
) -> int | None:
    """Problems like these that would show ``mean``; see ``Paired``."""
    if mean == 0:
        return None
    least = LEAST * len(gaps) / sum(gap != 0 for gap in gaps)
    return math.ceil(max(variance * (reach / mean) ** 2, least) - 1e-9)


def _samples_needed(
    pairs: Sequence[tuple[Sequence[bool], Sequence[bool]]],
    mean: float,
    variance: float,
    reach: float,
) -> int | None:
    """Samples per problem and arm at which these problems would show ``mean``.

    The variance of a problem's gap is that of its true gap plus that of sampling, which falls with
    the number of samples; the latter is estimated without bias from each problem's own samples.
    """
    within, measured = 0.0, 0.0
    for pair in pairs:
        if any(len(marks) < 2 for marks in pair):
            return None
        for marks in pair:
            share, n = _share(marks), len(marks)
            single = share * (1 - share) * n / (n - 1)
            within += single / len(pairs)
            measured += single / n / len(pairs)
    room = len(pairs) * (mean / reach) ** 2 - max(variance - measured, 0.0)
    return max(1, math.ceil(within / room)) if room > 0 else None


def holm(table: Sequence[Paired]) -> list[Paired]:
    """The same comparisons with p-values adjusted for their number.

    S. Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Stat. 6 (1979).
    """
    order = sorted(range(len(table)), key=lambda i: table[i].p)
    adjusted, most = dict.fromkeys(order, 1.0), 0.0
    for rank, index in enumerate(order):
        most = max(most, min(1.0, (len(table) - rank) * table[index].p))
        adjusted[index] = most
    return [replace(row, adjusted=adjusted[i]) for i, row in enumerate(table)]


def _name(arm: str, budget: int | str | None) -> str:
    return arm if budget is None else f"{arm} at budget {budget}"


def _limit(row: Paired) -> str:
    if row.detectable is None:
        return f", but so few of {row.problems} problems differ that none could show"
    return f"; one below {100 * row.detectable:.1f} points would not show"


def verdict(row: Paired) -> str:
    """One sentence: what a comparison shows, and what would settle it."""
    points = 100 * row.difference.value
    arm, base = _name(row.arm, row.budget), _name(row.base, row.base_budget)
    head = f"{arm} against {base}: {points:+.1f} points{QUANTITIES[row.quantity]}"
    if row.clear:
        return f"{head}, more than noise (p = {row.adjusted:.2g}, adjusted)."
    if row.problems_needed is None:
        return f"{head}: no difference{_limit(row)}."
    if row.p < ALPHA:
        remedy = "it shows alone, but not among so many comparisons"
    elif row.problems_needed <= row.problems:
        remedy = "a few more problems may settle it"
    else:
        remedy = f"about {row.problems_needed:,} problems would settle one of this size"
        if row.samples_needed is not None:
            remedy += f", or {row.samples_needed:,} samples of each of these {row.problems}"
    return f"{head}, within noise (p = {row.adjusted:.2g}, adjusted); {remedy}."
