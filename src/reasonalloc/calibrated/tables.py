"""Tables of calibrated files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reasonalloc.tables import Column, Table

if TYPE_CHECKING:
    from reasonalloc.calibrated.costs import CostProfile
    from reasonalloc.calibrated.demand import DemandProfile
    from reasonalloc.calibrated.statistics import Statistics


def milli(cost: float) -> str:
    """Return nats as thousandths, with 3 digits at least."""
    return f"{1000 * cost:#.3g}" if cost < 0.1 else f"{1000 * cost:.0f}"


def spaced(budgets: Sequence[int], most: int = 5) -> list[int]:
    """Return budgets evenly from all of them, as many as a table has room for."""
    last = min(most, len(budgets)) - 1
    return [budgets[round(i * (len(budgets) - 1) / last)] for i in range(last + 1)]


def cost_table(
    profile: CostProfile, budgets: Sequence[int], heads: bool = False, title: str = ""
) -> Table:
    """Return a row per layer or head, in 1/1000 nat per token.

    Args:
        profile: what was measured.
        budgets: some of its budgets, a column each.
        heads: a row per head; else per layer, summed over its heads.
        title: of the table.
    """
    points = [profile.budgets.index(size) for size in budgets]
    columns: list[Column] = [("layer", True), ("head" if heads else "costliest head", True)]
    columns += [(f"budget {size}", True) for size in budgets]
    rows: list[tuple[str, ...]] = []
    for index, layer in enumerate(profile.curves()):
        if heads:
            for number, head in enumerate(layer):
                rows.append((str(index), str(number), *(milli(head[p]) for p in points)))
        else:
            worst = max(range(len(layer)), key=lambda h: layer[h][points[0]])
            sums = [milli(sum(head[p] for head in layer)) for p in points]
            rows.append((str(index), str(worst), *sums))
    return Table(title, columns, rows)


def cost_notes(profile: CostProfile, shown: Sequence[int], how: str = "") -> list[str]:
    """Return the unit of a cost table, and the budgets that it leaves out and how to see them."""
    left = [str(size) for size in profile.budgets if size not in shown]
    also = [f"Also measured at {', '.join(left)}{how}."] if left else []
    return [*also, "Costs in 1/1000 nat per token; of a layer: summed over its heads."]


def joint_table(profiles: Sequence[CostProfile], title: str = "All heads at once") -> Table:
    """Return a row per profile and checked budget, in 1/1000 nat per token."""
    names = ("predicted", "measured", "equal budgets")
    columns: list[Column] = [("policy", False), ("budget", True), *((name, True) for name in names)]
    rows = [
        (
            profile.policy,
            f"{entry['budget']:.0f}",
            *(milli(entry[name]) for name in ("predicted", "measured", "uniform")),
        )
        for profile in profiles
        for entry in profile.joint
    ]
    return Table(title, columns, rows)


def demand_table(
    profile: DemandProfile,
    budgets: dict[int, list[int]] | None = None,
    prompts: bool = True,
    title: str = "",
) -> Table:
    """Return a row per layer: demand, and what it gets of each budget.

    Args:
        profile: what was measured.
        budgets: tokens per head of each layer, by budget.
        prompts: show the range over prompts as well.
        title: of the table.
    """
    columns: list[Column] = [("layer", True), ("mean over heads", True), ("largest head", True)]
    columns += [("prompts", True)] * prompts
    columns += [(f"budget {size}", True) for size in budgets or {}]
    rows: list[tuple[str, ...]] = []
    for index, (mean, most) in enumerate(zip(profile.demand_mean, profile.demand_max, strict=True)):
        cells = [str(index), f"{mean:.1f}", f"{most:.1f}"]
        each = [curve[index] for curve in profile.curves] or [mean]
        cells += [f"{min(each):.1f}-{max(each):.1f}"] * prompts
        rows.append((*cells, *(str(layers[index]) for layers in (budgets or {}).values())))
    return Table(title, columns, rows)


def statistics_table(statistics: Statistics) -> Table:
    """Return a row per layer."""
    middle = len(statistics.tops) // 2
    columns: list[Column] = [
        ("layer", True),
        ("entropy", True),
        ("variance", True),
        (f"share of the top {statistics.tops[middle]}", True),
    ]
    numbers = zip(
        statistics.layers,
        statistics.entropy.tolist(),
        statistics.variance.tolist(),
        statistics.top_share[middle].tolist(),
        strict=True,
    )
    rows = [
        (str(layer), f"{entropy:.4g}", f"{variance:.3g}", f"{share:.1%}")
        for layer, entropy, variance, share in numbers
    ]
    count = len(statistics.prompt_hashes)
    return Table(f"Window attention of each layer, {count} prompts", columns, rows)
