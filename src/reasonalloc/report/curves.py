"""Curves over depth from profile files: how far apart they are, and how stable over texts."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reasonalloc.calibrated.costs import CostProfile
from reasonalloc.calibrated.demand import DemandProfile
from reasonalloc.errors import UsageError

AnyProfile = DemandProfile | CostProfile

#: Median rank correlations from which a curve is called a property of the architecture, or mostly
#: one. Texts of one model cannot tell its architecture from its weights.
ARCHITECTURE, MOSTLY = 0.9, 0.6


def require_scipy() -> None:
    """Refuse if the library of the extra ``report`` that compares curves is missing.

    Raises:
        UsageError: says what to install.
    """
    if importlib.util.find_spec("scipy") is None:
        raise UsageError("comparing curves needs scipy: pip install 'reasonalloc[report]'")


def layer_costs(profile: CostProfile, budget: int, texts: list[int] | None = None) -> list[float]:
    """[layers] nats per token at a measured budget, summed over KV heads; see ``curves``."""
    point = profile.budgets.index(budget)
    return [sum(head[point] for head in layer) for layer in profile.curves(texts)]


def head_costs(profile: CostProfile, budget: int, texts: list[int] | None = None) -> list[float]:
    """[layers * kv_heads] nats per token at a measured budget."""
    point = profile.budgets.index(budget)
    return [head[point] for layer in profile.curves(texts) for head in layer]


def wave(profile: DemandProfile) -> dict[str, Any]:
    """Demand per layer as the pages show it: mean, largest head, and the range over prompts."""
    columns = list(zip(*profile.curves, strict=True))
    return {
        "rho": profile.rho,
        "steps": profile.steps,
        "prompts": len(profile.curves),
        "mean": profile.demand_mean,
        "max": profile.demand_max,
        "low": [min(column) for column in columns],
        "high": [max(column) for column in columns],
    }


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """Mean of curves of one length."""
    return [sum(column) / len(column) for column in zip(*curves, strict=True)]


def depths(layers: int) -> list[float]:
    """Relative depth of the middle of each layer, from 0 to 1."""
    return [(layer + 0.5) / layers for layer in range(layers)]


def distance(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Earth Mover's Distance over relative depth between normalised curves.

    Args:
        first, second: a number >= 0 per layer; lengths may differ.

    Returns:
        Share of the depth by which the mass lies apart, 0 to 1; None if a curve is 0 throughout.
    """
    from scipy.stats import wasserstein_distance

    if not sum(first) or not sum(second):
        return None
    return float(wasserstein_distance(depths(len(first)), depths(len(second)), first, second))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; of different lengths, the longer at the depths of the shorter.

    Returns:
        -1 to 1; None if a curve is constant or has fewer than 3 layers.
    """
    import numpy as np
    from scipy.stats import spearmanr

    short, long = sorted((first, second), key=len)
    if len(short) < 3:
        return None
    aligned = np.interp(depths(len(short)), depths(len(long)), long)
    if len(set(short)) == 1 or len(set(aligned)) == 1:
        return None
    return float(spearmanr(short, aligned).statistic)


@dataclass(frozen=True)
class Held:
    """Texts that were held out, against all others.

    Attributes:
        name: of the text or the kind.
        emd, rank: between the layers' curves, see ``distance`` and ``rank_correlation``.
        head_rank: rank correlation over all heads (cost profiles), or None.
    """

    name: str
    emd: float | None
    rank: float | None
    head_rank: float | None


@dataclass(frozen=True)
class Spread:
    """Median and range of ``n`` numbers; None if there are none."""

    n: int
    median: float | None
    low: float | None
    high: float | None


def spread(values: Sequence[float | None]) -> Spread:
    """Return median and range of the values that are there."""
    known = [value for value in values if value is not None]
    if not known:
        return Spread(0, None, None, None)
    return Spread(len(known), statistics.median(known), min(known), max(known))


def by_text(profile: AnyProfile, budget: int) -> list[Held]:
    """Each text against the mean of the others; ``budget`` matters to cost profiles alone."""
    if isinstance(profile, DemandProfile):
        names = [digest[:12] for digest in profile.prompt_hashes]
    else:
        kinds = profile.kinds
        names = [
            f"{digest[:12]} {kind}".strip()
            for digest, kind in zip(profile.text_hashes, kinds, strict=True)
        ]
    return [_held(profile, name, [index], budget) for index, name in enumerate(names)]


def by_kind(profile: AnyProfile, budget: int) -> list[Held]:
    """Each kind of text against all others; none if there are not at least two kinds."""
    if isinstance(profile, DemandProfile) or len(set(profile.kinds)) < 2:
        return []
    groups = []
    for kind in dict.fromkeys(profile.kinds):
        out = [index for index, other in enumerate(profile.kinds) if other == kind]
        groups.append(_held(profile, kind or "(no kind)", out, budget))
    return groups


def _held(profile: AnyProfile, name: str, out: list[int], budget: int) -> Held:
    if isinstance(profile, DemandProfile):
        rest = [curve for index, curve in enumerate(profile.curves) if index not in out]
        pair = [mean_curve([profile.curves[i] for i in out]), mean_curve(rest)]
        return Held(name, distance(*pair), rank_correlation(*pair), None)
    others = [index for index in range(len(profile.tokens)) if index not in out]
    pair = [layer_costs(profile, budget, texts) for texts in (out, others)]
    heads = [head_costs(profile, budget, texts) for texts in (out, others)]
    return Held(name, distance(*pair), rank_correlation(*pair), rank_correlation(*heads))


def answer(texts: Sequence[Held], kinds: Sequence[Held]) -> str:
    """One sentence: is the curve a property of the architecture, or of the text?"""
    medians = []
    for group, what in ((texts, "texts"), (kinds, "kinds of text")):
        ranks = [held.rank for held in group if held.rank is not None]
        if ranks:
            medians.append((statistics.median(ranks), ranks, what))
    if not medians:
        return "The curve is constant or has fewer than 3 layers, so its ranks say nothing."
    median, ranks, what = min(medians)
    if median >= ARCHITECTURE:
        verdict = "is a property of the architecture (or weights), not of the text"
    elif median >= MOSTLY:
        verdict = "is mostly a property of the architecture (or weights), partly of the text"
    else:
        verdict = "depends on the text, or the texts are too short to tell"
    return (
        f"The curve over layers {verdict}: rank correlation of each of {len(ranks)} {what} with "
        f"the others {median:.2f} (median; {min(ranks):.2f} to {max(ranks):.2f})"
        + (", which says little with so few." if len(ranks) < 5 else ".")
    )
