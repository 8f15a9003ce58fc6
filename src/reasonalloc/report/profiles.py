"""Comparisons of calibrated profiles: of two files, and of each text with all others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reasonalloc.allocators.layer import LayerQuery
from reasonalloc.allocators.layer.profile import FromProfile
from reasonalloc.calibrated import CostProfile, DemandProfile, open_calibrated
from reasonalloc.calibrated.tables import milli
from reasonalloc.config import CompressionConfig
from reasonalloc.errors import UsageError
from reasonalloc.report import curves
from reasonalloc.report.curves import AnyProfile, Held
from reasonalloc.tables import Column, Shown, Table

_MEASURES = ("emd", "rank", "head_rank")


@dataclass(frozen=True)
class Comparison(Shown):
    """How far two profiles of one kind are apart.

    Attributes:
        files, models: of the two profiles.
        budget: tokens per head at which costs are compared; None for demand profiles.
        emd: Earth Mover's Distance over relative depth, see ``curves.distance``.
        rank_correlation, head_rank_correlation: of layers, and of heads where shapes are equal.
        curves: [2][layers] demand in tokens, or nats per token.
        differences: how the files were made differently.
    """

    files: list[str]
    models: list[str]
    budget: int | None
    emd: float | None
    rank_correlation: float | None
    head_rank_correlation: float | None
    curves: list[list[float]]
    differences: list[str]

    def tables(self) -> list[Table]:
        """Return both curves side by side, a row per layer."""
        return [_side_by_side(self.curves, self.budget)]

    def notes(self) -> list[str]:
        """Return distance and correlations."""
        text = (
            f"Earth Mover's Distance {number(self.emd)} of the depth; rank correlation of layers "
            f"{number(self.rank_correlation)}"
        )
        if self.budget is not None:
            text += f", of heads {number(self.head_rank_correlation)}"
        return [text]


@dataclass(frozen=True)
class Stability(Shown):
    """Each text, and each kind of text, of a profile against all others.

    Attributes:
        profile: its file.
        budget: tokens per head at which costs are compared; None for a demand profile.
        answer: is the curve a property of the architecture? One sentence.
        summary: median and range of every measure, for ``texts`` and ``kinds``.
        texts, kinds: what was held out.
    """

    profile: str
    budget: int | None
    answer: str
    summary: dict[str, dict[str, dict[str, Any]]]
    texts: list[Held]
    kinds: list[Held]

    def tables(self) -> list[Table]:
        """Return a row per text, and per kind if there are several."""
        where = f" at budget {self.budget}" if self.budget else ""
        return [
            _held_table(name, group, self.summary[f"{name}s"], where)
            for name, group in (("text", self.texts), ("kind", self.kinds))
            if group
        ]

    def notes(self) -> list[str]:
        """Return the answer."""
        return [self.answer]


def compare(first: str, second: str, budget: int | None = None) -> Comparison:
    """Compare two profile files.

    Args:
        first, second: their paths.
        budget: of cost profiles: one that both were measured at; None: the smallest one.

    Raises:
        UsageError: files of different kinds, broken ones, or a budget that was not measured.
    """
    curves.require_scipy()
    one, two = load_profile(first), load_profile(second)
    at, heads = None, None
    if isinstance(one, CostProfile) and isinstance(two, CostProfile):
        at = _common_budget(one, two, budget)
        lines = [curves.layer_costs(one, at), curves.layer_costs(two, at)]
        if one.heads == two.heads:
            heads = curves.rank_correlation(curves.head_costs(one, at), curves.head_costs(two, at))
    elif isinstance(one, DemandProfile) and isinstance(two, DemandProfile):
        _no_budget(budget)
        lines = [one.demand_mean, two.demand_mean]
    else:
        kinds = ["costs" if isinstance(p, CostProfile) else "attention mass" for p in (one, two)]
        raise UsageError(
            f"{first!r} holds {kinds[0]} and {second!r} {kinds[1]}: compare files of one kind"
        )
    return Comparison(
        files=[first, second],
        models=[one.model_id, two.model_id],
        budget=at,
        emd=curves.distance(*lines),
        rank_correlation=curves.rank_correlation(*lines),
        head_rank_correlation=heads,
        curves=lines,
        differences=_differences(one, two),
    )


def stability(file: str, budget: int | None = None) -> Stability:
    """Compare each text of a profile file with the others.

    Args:
        file: its path.
        budget: of a cost profile: a measured budget; None: the smallest one.

    Raises:
        UsageError: a broken file, one text alone, or a budget that was not measured.
    """
    curves.require_scipy()
    profile = load_profile(file)
    if isinstance(profile, CostProfile):
        at = profile.budgets[0] if budget is None else measured_budget(profile, budget)
        count = len(profile.tokens)
    else:
        _no_budget(budget)
        at, count = 0, len(profile.curves)
    if count < 2:
        raise UsageError(f"{file!r} has one text alone: calibrate with at least two")
    texts, kinds = curves.by_text(profile, at), curves.by_kind(profile, at)
    return Stability(
        profile=file,
        budget=at or None,
        answer=curves.answer(texts, kinds),
        summary={"texts": _summary(texts), "kinds": _summary(kinds)},
        texts=texts,
        kinds=kinds,
    )


def load_profile(path: str | os.PathLike[str]) -> AnyProfile:
    """Read a demand profile or a cost profile.

    Raises:
        UsageError: it cannot be read, or is neither.
    """
    made = open_calibrated(path)
    if isinstance(made, DemandProfile | CostProfile):
        return made
    raise UsageError(f"profile {str(path)!r} holds statistics, which have no curves to compare")


def divided(file: str, profile: DemandProfile, budget: int) -> list[int]:
    """Return [layers] tokens per head that the allocator ``profile`` gives at a mean budget."""
    query = LayerQuery(
        layers=profile.layers,
        kv_heads=1,
        budget=budget,
        window=CompressionConfig(budget=budget).window,
        model_id=profile.model_id,
        config_hash=profile.config_hash,
    )
    return FromProfile(str(Path(file).expanduser())).allocate(query)


def measured_budget(profile: CostProfile, budget: int) -> int:
    """Return the budget, if costs were measured at it.

    Raises:
        UsageError: they were not; says at which.
    """
    if budget not in profile.budgets:
        raise UsageError(f"--budget={budget} was not measured: choose from {_some(profile)}")
    return budget


def number(value: float | None) -> str:
    """Return three decimals, or a dash for what is not defined."""
    return "-" if value is None else f"{value:.3f}"


def _some(profile: CostProfile) -> str:
    return ", ".join(map(str, profile.budgets))


def _common_budget(one: CostProfile, two: CostProfile, budget: int | None) -> int:
    common = [size for size in one.budgets if size in two.budgets]
    if budget is None and common:
        return common[0]
    if budget in common:
        return budget
    what = "no budget is in both files" if not common else f"--budget={budget} is not in both files"
    raise UsageError(
        f"{what}: A was measured at {_some(one)}, B at {_some(two)}: "
        + ("choose one of " + ", ".join(map(str, common)) if common else "calibrate one again")
    )


def _no_budget(budget: int | None) -> None:
    if budget is not None:
        raise UsageError(f"--budget={budget} has no effect with attention mass: leave it out")


def _differences(one: AnyProfile, two: AnyProfile) -> list[str]:
    """Return how two files were made differently."""
    lines = []
    for name in ("model_id", "rho", "objective", "policy", "interval", "window", "keys"):
        values = [getattr(profile, name, None) for profile in (one, two)]
        if values[0] != values[1]:
            lines.append(f"{name} differs: {values[0]!r} and {values[1]!r}")
    if one.layers != two.layers:
        lines.append("layer counts differ, so ranks compare the longer curve at the other's depths")
    return lines


def _summary(group: Sequence[Held]) -> dict[str, dict[str, Any]]:
    return {
        measure: asdict(curves.spread([getattr(held, measure) for held in group]))
        for measure in _MEASURES
    }


def _side_by_side(lines: Sequence[Sequence[float]], budget: int | None) -> Table:
    """Return a row per layer; costs at a budget, or demand. Curves may differ in length."""
    rows: list[tuple[str, ...]] = []
    for index in range(max(map(len, lines))):
        cells = [str(index)]
        for line in lines:
            if index < len(line):
                value = f"{line[index]:.1f}" if budget is None else milli(line[index])
                share = f"{line[index] / sum(line):.1%}" if sum(line) else "-"
                cells += [f"{curves.depths(len(line))[index]:.2f}", value, share]
            else:
                cells += ["", "", ""]
        rows.append(tuple(cells))
    names = ("layer", "depth", "A", "share", "depth", "B", "share")
    what = "Demand" if budget is None else f"Cost at budget {budget}"
    return Table(f"{what} of each layer", [(name, True) for name in names], rows)


def _held_table(
    name: str, group: Sequence[Held], summary: dict[str, dict[str, Any]], where: str
) -> Table:
    """Return a row per text or kind that was held out, then median and range."""
    columns: list[Column] = [(name, False), ("EMD", True), ("rank", True), ("rank of heads", True)]
    rows = [(h.name, number(h.emd), number(h.rank), number(h.head_rank)) for h in group]
    medians, ranges = [], []
    for spread in (summary[measure] for measure in _MEASURES):
        medians.append(number(spread["median"]))
        low, high = number(spread["low"]), number(spread["high"])
        ranges.append("-" if low == "-" else f"{low} to {high}")
    shown = 3 if all(held.head_rank is None for held in group) else 4  # heads: of costs alone
    lines = [*rows, ("median", *medians), ("range", *ranges)]
    title = f"Each {name} against the others{where}"
    return Table(title, columns[:shown], [line[:shown] for line in lines])
