"""Tables of ``reasonalloc profile``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from reasonalloc.calibrated.costs import CostProfile
from reasonalloc.calibrated.demand import DemandProfile

if TYPE_CHECKING:
    from reasonalloc.report.curves import Held

Columns = list[tuple[str, bool]]
Rows = list[tuple[str, ...]]


def cost_table(
    profile: CostProfile, budgets: list[int], heads: bool = False
) -> tuple[Columns, Rows]:
    """A row per layer or head, in 1/1000 nat per token."""
    points = [profile.budgets.index(size) for size in budgets]
    curves = profile.curves()
    columns: Columns = [("layer", True), ("head" if heads else "costliest head", True)]
    columns += [(f"budget {size}", True) for size in budgets]
    rows: Rows = []
    for index, layer in enumerate(curves):
        if heads:
            for number, head in enumerate(layer):
                rows.append((str(index), str(number), *(milli(head[p]) for p in points)))
        else:
            worst = max(range(len(layer)), key=lambda h: layer[h][points[0]])
            sums = [milli(sum(head[p] for head in layer)) for p in points]
            rows.append((str(index), str(worst), *sums))
    return columns, rows


def spaced(budgets: list[int], most: int = 5) -> list[int]:
    """Budgets evenly from all of them, as many as a table has room for."""
    last = min(most, len(budgets)) - 1
    return [budgets[round(i * (len(budgets) - 1) / last)] for i in range(last + 1)]


def joint_table(profiles: Sequence[CostProfile]) -> tuple[Columns, Rows]:
    """A row per profile and checked budget, in 1/1000 nat per token."""
    names = ("predicted", "measured", "equal budgets")
    columns: Columns = [("policy", False), ("budget", True), *((name, True) for name in names)]
    rows: Rows = []
    for profile in profiles:
        for entry in profile.joint:
            found = (milli(entry[name]) for name in ("predicted", "measured", "uniform"))
            rows.append((profile.policy, f"{entry['budget']:.0f}", *found))
    return columns, rows


def divided(file: str, profile: DemandProfile, budget: int) -> list[int]:
    """[layers] tokens per head that the allocator ``profile`` gives at a mean budget."""
    from reasonalloc.allocators.layer import LayerQuery
    from reasonalloc.allocators.layer.profile import FromProfile
    from reasonalloc.config import CompressionConfig

    window = CompressionConfig(budget=budget).window
    query = LayerQuery(
        layers=len(profile.demand_mean),
        kv_heads=1,
        budget=budget,
        window=window,
        model_id=profile.model_id,
        config_hash=profile.config_hash,
    )
    return FromProfile(str(Path(file).expanduser())).allocate(query)


def demand_table(profile: DemandProfile, budgets: dict[int, list[int]]) -> tuple[Columns, Rows]:
    """A row per layer: demand, its range over prompts, and what it gets of each budget."""
    columns: Columns = [("layer", True), ("mean over heads", True), ("largest head", True)]
    columns += [("prompts", True), *((f"budget {size}", True) for size in budgets)]
    rows: Rows = []
    for index, (mean, most) in enumerate(zip(profile.demand_mean, profile.demand_max, strict=True)):
        each = [curve[index] for curve in profile.curves]
        cells = [str(index), f"{mean:.1f}", f"{most:.1f}", f"{min(each):.1f}-{max(each):.1f}"]
        rows.append((*cells, *(str(layers[index]) for layers in budgets.values())))
    return columns, rows


def side_by_side(lines: Sequence[Sequence[float]], budget: int | None) -> tuple[Columns, Rows]:
    """A row per layer; costs at a budget, or demand. Curves may differ in length."""
    from reasonalloc.report.curves import depths

    rows: Rows = []
    for index in range(max(map(len, lines))):
        cells = [str(index)]
        for line in lines:
            if index < len(line):
                value = f"{line[index]:.1f}" if budget is None else milli(line[index])
                share = f"{line[index] / sum(line):.1%}" if sum(line) else "-"
                cells += [f"{depths(len(line))[index]:.2f}", value, share]
            else:
                cells += ["", "", ""]
        rows.append(tuple(cells))
    names = ("layer", "depth", "A", "share", "depth", "B", "share")
    return [(name, True) for name in names], rows


def held_table(name: str, group: Sequence[Held], summary: dict[str, Any]) -> tuple[Columns, Rows]:
    """A row per text or kind that was held out, then median and range."""
    columns: Columns = [(name, False), ("EMD", True), ("rank", True), ("rank of heads", True)]
    rows: Rows = [
        (escape(h.name), number(h.emd), number(h.rank), number(h.head_rank)) for h in group
    ]
    spreads = list(summary.values())
    rows.append(("median", *(number(s["median"]) for s in spreads)))
    ends = [(number(s["low"]), number(s["high"])) for s in spreads]
    rows.append(("range", *("-" if low == "-" else f"{low} to {high}" for low, high in ends)))
    if all(held.head_rank is None for held in group):  # attention mass
        return columns[:3], [row[:3] for row in rows]
    return columns, rows


def milli(cost: float) -> str:
    """Nats as thousandths, with 3 digits at least."""
    return f"{1000 * cost:#.3g}" if cost < 0.1 else f"{1000 * cost:.0f}"


def number(value: float | None) -> str:
    """Three decimals, or a dash for what is not defined."""
    return "-" if value is None else f"{value:.3f}"
