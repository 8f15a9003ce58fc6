"""What samples say about arms: shares with intervals, paired differences, what would settle them.

Samples of one problem are not independent, so everything is clustered by problem. Needs scipy
(extra ``report``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from reasonalloc.evaluation.intervals import Z95, bootstrap_ratio, clustered_wilson
from reasonalloc.evaluation.samples import Sample

ALPHA, POWER = 0.05, 0.8
#: Problems that must differ, all one way, before an exact two-sided test can show it: 2 / 2^6.
LEAST = 6
#: Wanted k of pass@k, where there are so many samples of every problem.
KS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """One arm at one budget.

    Attributes:
        arm, budget: ``budget`` is None for the full cache.
        problems, samples: how many there are.
        fewest, most: samples of one problem.
        pass_at: pass@k by k; pass@1 is the mean over problems of the share of right samples
            (avg@n). Every k up to ``fewest``.
        tokens: generated tokens per sample, mean.
        cap_hits: samples that the cap on new tokens ended.
        compressions: layer compressions, all samples; 0 with a budget: same as the full cache.
        kv_bytes, full_kv_bytes: most per sequence; of the full cache at the same lengths.
        peak_bytes: most device memory, or None if nothing measured it.
        tokens_per_second: generated tokens per second of wall time of the batches, per process.
        batches: smallest and largest batch.
    """

    arm: str
    budget: int | None
    problems: int
    samples: int
    fewest: int
    most: int
    pass_at: dict[int, Estimate]
    tokens: Estimate
    cap_hits: int
    compressions: int
    kv_bytes: int
    full_kv_bytes: int
    peak_bytes: int | None
    tokens_per_second: float | None
    batches: tuple[int, int]

    @property
    def accuracy(self) -> Estimate:
        """pass@1."""
        return self.pass_at[1]


@dataclass(frozen=True)
class Paired:
    """An arm against the base arm on the problems that both have.

    Attributes:
        arm, budget, base, base_budget: what is compared.
        problems: common problems.
        difference: of pass@1, arm minus base, with a bootstrap interval over problems.
        better, worse: problems on which the arm's share is higher, lower.
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
    budget: int | None
    base: str
    base_budget: int | None
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

    @property
    def clear(self) -> bool:
        """Whether the difference is more than noise, all comparisons considered."""
        return self.adjusted < ALPHA


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of ``k`` samples is right.

    M. Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, eq. 1.

    Raises:
        ValueError: fewer than ``k`` samples, or more right ones than samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"{correct} right of {samples} samples give no pass@{k}")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def by_problem(samples: Iterable[Sample]) -> dict[str, list[Sample]]:
    """Samples of every problem, in the order in which problems first appear."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.problem, []).append(sample)
    return found


def by_cell(samples: Iterable[Sample]) -> dict[tuple[str, int | None], list[Sample]]:
    """Samples of every (arm, budget), in the order in which those first appear."""
    found: dict[tuple[str, int | None], list[Sample]] = {}
    for sample in samples:
        found.setdefault((sample.arm, sample.budget), []).append(sample)
    return found


def _quantile(clusters: int, trials: int) -> float:
    """Student's t where a variance between problems was estimated, else the normal's."""
    if trials == clusters or clusters < 2:
        return Z95
    from scipy.stats import t

    return float(t.ppf(1 - ALPHA / 2, clusters - 1))


def summarise(samples: Sequence[Sample]) -> Cell:
    """Numbers of one arm at one budget.

    Raises:
        ValueError: no samples.
    """
    problems = list(by_problem(samples).values())
    if not problems:
        raise ValueError("no samples")
    counts = [len(p) for p in problems]
    right = [sum(s.correct for s in p) for p in problems]
    quantile = _quantile(len(problems), len(samples))
    estimates = {}
    for k in (k for k in KS if k <= min(counts)):
        shares = [pass_at_k(n, c, k) for n, c in zip(counts, right, strict=True)]
        low, high = clustered_wilson(shares, len(samples), quantile)
        estimates[k] = Estimate(math.fsum(shares) / len(shares), low, high)
    lengths = [float(sum(s.completion_tokens for s in p)) for p in problems]
    seconds = math.fsum(s.seconds / s.batch for s in samples)
    peaks = [s.peak_bytes for s in samples if s.peak_bytes is not None]
    return Cell(
        arm=samples[0].arm,
        budget=samples[0].budget,
        problems=len(problems),
        samples=len(samples),
        fewest=min(counts),
        most=max(counts),
        pass_at=estimates,
        tokens=Estimate(
            sum(lengths) / len(samples), *bootstrap_ratio(lengths, [float(n) for n in counts])
        ),
        cap_hits=sum(s.finish == "length" for s in samples),
        compressions=sum(s.compressions for s in samples),
        kv_bytes=max(s.kv_bytes for s in samples),
        full_kv_bytes=max(s.full_kv_bytes for s in samples),
        peak_bytes=max(peaks) if peaks else None,
        tokens_per_second=sum(lengths) / seconds if seconds > 0 else None,
        batches=(min(s.batch for s in samples), max(s.batch for s in samples)),
    )


def compare(arm: Sequence[Sample], base: Sequence[Sample]) -> Paired | None:
    """Paired difference of pass@1 on common problems; None if there are fewer than two."""
    left, right = by_problem(arm), by_problem(base)
    pairs = [(left[name], right[name]) for name in left if name in right]
    if len(pairs) < 2:
        return None
    gaps = [_share(a) - _share(b) for a, b in pairs]
    mean = math.fsum(gaps) / len(gaps)
    mean = 0.0 if abs(mean) < 1e-12 else mean  # thirds do not cancel exactly
    better, worse = sum(g > 0 for g in gaps), sum(g < 0 for g in gaps)
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
        problems_needed=None
        if mean == 0
        else math.ceil(
            max(variance * (reach / mean) ** 2, LEAST * len(gaps) / (better + worse)) - 1e-9
        ),
        samples_needed=None if mean == 0 else _samples_needed(pairs, mean, variance, reach),
    )


def _share(samples: Sequence[Sample]) -> float:
    return sum(s.correct for s in samples) / len(samples)


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
    if not moved:
        return 1.0
    found = permutation_test(
        (numpy.array(moved),),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        rng=0,
    )
    return float(found.pvalue)


def _samples_needed(
    pairs: Sequence[tuple[Sequence[Sample], Sequence[Sample]]],
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
        if any(len(samples) < 2 for samples in pair):
            return None
        for samples in pair:
            share, n = _share(samples), len(samples)
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


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points (cost, gain) no other point beats: none costs less and gains as much or more."""
    return [
        not any((c <= cost and g >= gain and (c, g) != (cost, gain)) for c, g in points)
        for cost, gain in points
    ]


def _name(arm: str, budget: int | None) -> str:
    return arm if budget is None else f"{arm} at budget {budget}"


def _limit(row: Paired) -> str:
    if row.detectable is None:
        return f", but so few of {row.problems} problems differ that none could show"
    return f"; one below {100 * row.detectable:.1f} points would not show"


def verdict(row: Paired) -> str:
    """One sentence: what a comparison shows, and what would settle it."""
    points = 100 * row.difference.value
    arm, base = _name(row.arm, row.budget), _name(row.base, row.base_budget)
    head = f"{arm} against {base}: {points:+.1f} points"
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
