"""What samples say about each arm: pass@k with intervals, tokens, bytes, speed.

Samples of one problem are not independent, so everything is clustered by problem.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from reasonalloc.evaluation.intervals import bootstrap_ratio, mean_interval
from reasonalloc.evaluation.samples import Sample

ALPHA = 0.05
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
        cut, went_on: shares of samples that this cap ended, and that went on after their answer
            (``endings.went_on``); means over problems, as pass@1.
        compressions: layer compressions, all samples; 0 with a budget: same as the full cache.
        kv_bytes, full_kv_bytes: most per sequence; of the full cache at the same lengths.
        peak_bytes: most device memory, or None if nothing measured it.
        tokens_per_second: generated tokens per second of wall time of the batches, per process.
        batches: smallest and largest batch.
    """

    arm: str
    budget: int | str | None
    problems: int
    samples: int
    fewest: int
    most: int
    pass_at: dict[int, Estimate]
    tokens: Estimate
    cap_hits: int
    cut: Estimate
    went_on: Estimate
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
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.problem, []).append(sample)
    return groups


def by_cell(samples: Iterable[Sample]) -> dict[tuple[str, int | str | None], list[Sample]]:
    """Samples of every (arm, budget), in the order in which those first appear."""
    groups: dict[tuple[str, int | str | None], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.arm, sample.budget), []).append(sample)
    return groups


def make_cell(samples: Sequence[Sample]) -> Cell:
    """Numbers of one arm at one budget.

    Raises:
        ValueError: no samples.
    """
    problems = list(by_problem(samples).values())
    if not problems:
        raise ValueError("no samples")
    counts = [len(p) for p in problems]
    right = [sum(s.correct for s in p) for p in problems]
    estimates = {}
    for k in (k for k in KS if k <= min(counts)):
        shares = [pass_at_k(n, c, k) for n, c in zip(counts, right, strict=True)]
        estimates[k] = _share(shares, len(samples))
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
        cap_hits=sum(s.cut for s in samples),
        cut=_share([_mean(s.cut for s in p) for p in problems], len(samples)),
        went_on=_share([_mean(s.went_on for s in p) for p in problems], len(samples)),
        compressions=sum(s.compressions for s in samples),
        kv_bytes=max(s.kv_bytes for s in samples),
        full_kv_bytes=max(s.full_kv_bytes for s in samples),
        peak_bytes=max(peaks) if peaks else None,
        tokens_per_second=sum(lengths) / seconds if seconds > 0 else None,
        batches=(min(s.batch for s in samples), max(s.batch for s in samples)),
    )


def _mean(marks: Iterable[bool]) -> float:
    return fmean(map(float, marks))


def _share(shares: Sequence[float], samples: int) -> Estimate:
    """Mean of the problems' shares."""
    return Estimate(math.fsum(shares) / len(shares), *mean_interval(shares, samples))


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points (cost, gain) no other point beats: none costs less and gains as much or more."""
    return [
        not any((c <= cost and g >= gain and (c, g) != (cost, gain)) for c, g in points)
        for cost, gain in points
    ]
