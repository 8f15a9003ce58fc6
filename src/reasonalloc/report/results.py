"""The data of the page that ``reasonalloc report`` writes, as plain JSON values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from reasonalloc.calibrated.demand import load_profile
from reasonalloc.errors import UsageError, unknown_name
from reasonalloc.evaluation.kv_share import kv_summary, sample_reference
from reasonalloc.evaluation.paired import Paired, compare, holm, verdict
from reasonalloc.evaluation.samples import Group, Sample
from reasonalloc.evaluation.statistics import Cell, Estimate, by_cell, make_cell, pareto
from reasonalloc.report.curves import wave
from reasonalloc.report.drilldown import Room, drilldown
from reasonalloc.report.heads import head_budgets
from reasonalloc.version import __version__

TEMPLATE = "results.html.j2"
FULL = "full"
#: Arm and budget.
_Key = tuple[str, int | str | None]
#: How samples end: what is compared beside right answers, if any sample ends so.
ENDINGS = ("cut", "went_on")
PAPER = Path(__file__).with_name("paper.json")


def results(groups: Sequence[Group], base: str | None, paper: bool) -> dict[str, Any]:
    """Everything that the page, the tables and ``--json`` show.

    Args:
        groups: what may be compared, from ``load_groups``.
        base: arm that all others are compared with; None: the first that compresses.
        paper: lay the paper's own numbers beside.

    Raises:
        UsageError: no group has the base arm.
    """
    arms = {sample.arm for group in groups for sample in group.samples}
    if base is not None and base not in arms:
        raise unknown_name("base arm", base, arms)
    printed = json.loads(PAPER.read_text("utf-8")) if paper else None
    room = Room()
    return {
        "version": __version__,
        "paper": None if printed is None else {k: v for k, v in printed.items() if k != "tasks"},
        "groups": [_group(i, g, base, printed, room) for i, g in enumerate(groups)],
    }


def _group(
    index: int, group: Group, base: str | None, printed: dict[str, Any] | None, room: Room
) -> dict[str, Any]:
    parts = by_cell(group.samples)
    arms = list(dict.fromkeys(arm for arm, _ in parts))
    notices = list(group.notices)
    wanted = base or next((arm for arm in arms if arm != FULL), arms[0])
    if wanted not in arms:
        notices.append(f"the base arm {wanted} did not run here, so there is no paired table")
    reference, sizes = _sizes(group, parts)
    budgets = _budgets(sizes)
    order = [None, *budgets]
    keys = sorted(parts, key=lambda key: (order.index(key[1]), arms.index(key[0])))
    cells = [make_cell(parts[key]) for key in keys]
    own = [parts[key] for key in keys]
    paired = holm(_paired(own, wanted, "correct"))
    problems = list(dict.fromkeys(sample.problem for sample in group.samples))
    notices += _uneven(cells, len(problems))
    profile, profile_notice = _profile(group)
    notices += profile_notice
    return {
        "id": index,
        "model": _title(group.model),
        "task": group.task,
        "settings": _settings(group.protocol),
        "folders": [folder.resolve().name for folder in group.folders],
        "manifests": [json.dumps(manifest, indent=1) for manifest in group.manifests],
        "notices": notices,
        "arms": arms,
        "budgets": budgets,
        "reference": reference,
        "base": wanted if wanted in arms else None,
        "problems": len(problems),
        "cells": _cells(cells, [sizes[key] for key in keys]),
        "paired": [_pair(row) for row in paired],
        "paired_endings": [_pair(row) for row in _endings(own, wanted)],
        "paper": None if printed is None else printed["tasks"].get(group.task),
        "profile": profile,
        "heads": head_budgets(group.folders, arms, budgets),
        "drilldown": drilldown(problems, own, room),
    }


def _sizes(
    group: Group, parts: dict[_Key, list[Sample]]
) -> tuple[dict[str, Any] | None, dict[_Key, dict[str, Any]]]:
    """The full cache that is 100 %, and the KV bytes of every arm and budget."""
    bound = group.protocol.get("max_new_tokens")
    found = sample_reference([vars(sample) for sample in group.samples], bound)
    sizes = {key: kv_summary([vars(s) for s in part], found) for key, part in parts.items()}
    if found is None:
        return None, sizes
    return {**asdict(found), "tokens": round(found.tokens), "title": found.title}, sizes


def _budgets(sizes: dict[_Key, dict[str, Any]]) -> list[int | str]:
    """Budgets from small to large by the fewest tokens that an arm has there."""
    fewest: dict[int | str, float] = {}
    for (_, budget), size in sizes.items():
        if budget is not None:
            tokens = size["budget_tokens"] or 0.0
            fewest[budget] = min(tokens, fewest.get(budget, tokens))
    return sorted(fewest, key=lambda budget: (fewest[budget], str(budget)))


def _paired(parts: Sequence[Sequence[Sample]], base: str, quantity: str) -> list[Paired]:
    """Every cell against the base arm's at the same budget; the full cache has every budget."""
    bases = [part for part in parts if part[0].arm == base]
    pairs = []
    for part in parts:
        for other in bases:
            budgets = {part[0].budget, other[0].budget}
            if part[0].arm != base and (len(budgets) == 1 or None in budgets):
                pairs.append(compare(part, other, quantity))
    return [row for row in pairs if row is not None]


def _endings(parts: Sequence[Sequence[Sample]], base: str) -> list[Paired]:
    """Cut samples, and samples that went on, against the base arm's: of each kind that there is."""
    kinds = [kind for kind in ENDINGS if any(getattr(s, kind) for part in parts for s in part)]
    return holm([row for kind in kinds for row in _paired(parts, base, kind)])


def _uneven(cells: Sequence[Cell], problems: int) -> list[str]:
    notices = []
    if any(cell.problems != problems for cell in cells):
        notices.append(
            "the arms have not all run on the same problems (an unfinished run?): shares of "
            "different problems do not compare, the paired table uses common problems only"
        )
    if len({n for cell in cells for n in (cell.fewest, cell.most)}) > 1:
        notices.append("not every problem has the same number of samples; problems weigh the same")
    if len({cell.batches for cell in cells}) > 1:
        notices.append("batch sizes differ, and with them tokens per second")
    if idle := [f"{c.arm} at {c.budget}" for c in cells if c.budget and not c.compressions]:
        notices.append(f"never compressed, so the same as the full cache: {', '.join(idle)}")
    return notices


def _estimate(value: Estimate) -> list[float]:
    return [round(number, 6) for number in astuple(value)]


def _cells(cells: Sequence[Cell], sizes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    gains = [cell.accuracy.value for cell in cells]
    speeds = [cell.tokens_per_second or 0.0 for cell in cells]
    held: list[float] = [size["kv_share"] for size in sizes]
    if None in held:  # samples of older versions
        held = [float(cell.kv_bytes) for cell in cells]
    by_bytes = pareto(list(zip(held, gains, strict=True)))
    by_speed = pareto([(-s, g) for s, g in zip(speeds, gains, strict=True)])
    return [
        {
            "arm": cell.arm,
            "budget": cell.budget,
            "problems": cell.problems,
            "samples": cell.samples,
            "per_problem": [cell.fewest, cell.most],
            "accuracy": round(cell.accuracy.value, 6),
            "interval95": _estimate(cell.accuracy)[1:],
            "pass_at": {str(k): _estimate(value) for k, value in cell.pass_at.items()},
            "tokens": _estimate(cell.tokens),
            "cap_hits": cell.cap_hits,
            "cut": _estimate(cell.cut),
            "went_on": _estimate(cell.went_on),
            "compressions": cell.compressions,
            "never_compressed": cell.budget is not None and cell.compressions == 0,
            "kv_bytes_per_sequence": cell.kv_bytes,
            "full_kv_bytes_per_sequence": cell.full_kv_bytes,
            "peak_bytes": cell.peak_bytes,
            "tokens_per_second": cell.tokens_per_second and round(cell.tokens_per_second, 2),
            "batches": list(cell.batches),
            **sizes[i],
            "front_bytes": by_bytes[i],
            "front_speed": by_speed[i],
        }
        for i, cell in enumerate(cells)
    ]


def _pair(row: Paired) -> dict[str, Any]:
    return {
        "quantity": row.quantity,
        "arm": row.arm,
        "budget": row.budget,
        "base": row.base,
        "base_budget": row.base_budget,
        "problems": row.problems,
        "difference": _estimate(row.difference),
        "better": row.better,
        "worse": row.worse,
        "test": row.test,
        "p": row.p,
        "adjusted_p": row.adjusted,
        "beyond_noise": row.clear,
        "detectable": row.detectable,
        "problems_needed": row.problems_needed,
        "samples_needed": row.samples_needed,
        "verdict": verdict(row),
    }


def _title(model: str) -> str:
    """A hub name as it is, of a path its last part."""
    return Path(model).name if model.startswith(("/", "~", ".")) else model


def _settings(protocol: dict[str, Any]) -> list[list[str]]:
    """Names and values of what a reader has to know; fingerprints are in the manifests."""
    return [
        [name.replace("_", " "), value if isinstance(value, str) else json.dumps(value)]
        for name, value in protocol.items()
        if value is not None and name != "kind" and not name.endswith("_hash")
    ]


def _profile(group: Group) -> tuple[dict[str, Any] | None, list[str]]:
    """The wave of the first profile file that a manifest names and that is still there."""
    for manifest in group.manifests:
        files = manifest.get("profiles")
        name = files.get("profile") if isinstance(files, dict) else None
        if not isinstance(name, str) or not Path(name).is_file():
            continue
        try:
            profile = load_profile(name)
        except UsageError as error:
            return None, [f"there is no wave: {error}"]
        return wave(profile), []
    return None, []
