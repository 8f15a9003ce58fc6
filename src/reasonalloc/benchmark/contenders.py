"""Contenders of a benchmark from the names of arms."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

from reasonalloc.benchmark.decode import STATIC, Contender
from reasonalloc.config import Arm, Step, parse_arm, split_arms
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.arm_files import as_settings, choose_files
from reasonalloc.evaluation.arms import check_names
from reasonalloc.evaluation.batch import Job, Settings


def make_contenders(
    arms: str,
    paths: Sequence[str],
    budgets: Sequence[int | str],
    steps: Sequence[str],
    **settings: Any,
) -> list[Contender]:
    """Return every arm at every budget and kind of step; the full cache has neither.

    Args:
        arms: names, separated by commas; ``full`` and ``full-static`` are no compression.
        paths: calibrated files, of different kinds.
        budgets: mean tokens per head, or bytes as texts.
        steps: how decode steps run, see ``CompressionConfig``.
        settings: other fields of ``evaluation.batch.Settings``.

    Raises:
        UsageError: no arm, an unknown one, or a file that is missing or that nothing reads.
    """
    names = list(dict.fromkeys(split_arms(arms)))
    compressing = [n for n in names if n != STATIC and parse_arm(n) is not None]
    for name in compressing:
        check_names(cast("Arm", parse_arm(name)))
    shared = {**as_settings(choose_files(compressing, paths)), **settings}
    contenders = []
    for name in names:
        if name not in compressing:
            contenders.append(Contender(name))
            continue
        for budget, step in itertools.product(budgets, steps):
            config = Settings(**shared, step=cast("Step", step)).config(Job(name, budget))
            sized = name if len(budgets) == 1 else f"{name} at {budget}"
            contenders.append(Contender(sized if len(steps) == 1 else f"{sized}, {step}", config))
    if not contenders:
        raise UsageError("arms is empty: name at least one, as full,rkv")
    return contenders
