"""Costs of single heads put to the test: all heads under their budgets at once."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reasonalloc.allocators.minimise import interpolate
from reasonalloc.calibrated.costs import CostProfile
from reasonalloc.calibration.checks import Estimate, counter, evicts, now, pinned_tokens
from reasonalloc.config import Arm, CompressionConfig, Prompt
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.replay import full_logits, measure_fidelity
from reasonalloc.integrations.hf.model import check_model
from reasonalloc.planning.budget import BudgetPlan
from reasonalloc.planning.shapes import model_name, text_config
from reasonalloc.texts import Trajectory
from reasonalloc.whole import whole_number, whole_numbers

#: Budgets that are checked where the texts are long enough.
BUDGETS = (64, 128)
#: Texts that are replayed, from the first.
TEXTS = 3
_ENTRY = ("budget", "predicted", "measured", "uniform")
_LEAST_KL = 1e-12  # nats; keeps the logarithm of a cost finite


#: A run with budgets of its own, and one with equal budgets.
Pair = tuple[CompressionConfig, CompressionConfig]


def budgets_to_check(
    texts: Sequence[Trajectory],
    wanted: Sequence[int] | None,
    interval: int,
    window: int,
    prompt: Prompt = "evict",
) -> list[int]:
    """Return mean budgets at which something is evicted from a replayed text.

    Args:
        texts: calibration texts.
        wanted: budgets to check, or None for ``BUDGETS``, as far as they are at most half of the
            longest text, or else a quarter of it; none if that evicts nothing.
        interval, window: the cadence.
        prompt: ``evict`` or ``pin``.

    Raises:
        UsageError: a wanted budget is below the window, evicts nothing or is given twice.
    """

    def works(size: int) -> bool:
        return size >= window and any(
            evicts(text, size, interval, prompt) for text in texts[:TEXTS]
        )

    interval = whole_number("interval", interval, 1)
    longest = max(
        len(t.prompt_ids) + len(t.completion_ids) - 1 - pinned_tokens(t, prompt)
        for t in texts[:TEXTS]
    )
    if wanted is None:
        usual = [size for size in BUDGETS if size <= longest // 2 and works(size)]
        return usual or [size for size in [max(longest // 4, window)] if works(size)]
    wanted = whole_numbers("check", wanted)
    for size in wanted:
        if not works(size) or wanted.count(size) > 1:
            raise UsageError(
                f"check={','.join(map(str, wanted))}: give different budgets, at least {window} "
                f"(the window), that evict something from the first {TEXTS} texts (the longest has "
                f"{longest} tokens{' besides its prompt' if prompt == 'pin' else ''})"
            )
    return wanted


def steps(texts: Sequence[Trajectory], profiles: int, budgets: Sequence[int]) -> int:
    """Return the passes over a text that ``joint_costs`` makes."""
    return len(texts[:TEXTS]) * (1 + 2 * profiles * len(budgets)) if budgets else 0


def estimate(
    model: Any, texts: Sequence[Trajectory], profiles: int, budgets: Sequence[int]
) -> Estimate:
    """Return what ``joint_costs`` will take, from a timed pass with the full cache."""
    lengths = [len(t.prompt_ids) + len(t.completion_ids) - 1 for t in texts[:TEXTS]]
    passes = steps(texts, profiles, budgets) // len(lengths)
    if not passes:
        return Estimate(0, 0.0)
    start = now(model)
    full_logits(model, texts[0])
    each = (now(model) - start) / lengths[0]
    return Estimate(passes * sum(lengths), passes * sum(lengths) * each)


def joint_costs(
    model: Any,
    texts: Sequence[Trajectory],
    profiles: Sequence[CostProfile],
    budgets: Sequence[int],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[CostProfile]:
    """Replay the first texts under the budgets that profiles give, and under equal ones.

    Args:
        model: the model of the profiles, not attached to anything.
        texts: those that the profiles were made with.
        profiles: of one cadence, such as those of several policies.
        budgets: mean tokens per head, each at least the window.
        on_progress: called with passes done and in all, after each.

    Returns:
        The profiles with ``joint`` filled, a mean over tokens of the first ``TEXTS`` texts.

    Raises:
        UsageError: a budget below the window, or profiles of several cadences or other models.
    """
    cadences = {(each.interval, each.window, each.prompt) for each in profiles}
    if len(cadences) > 1:
        raise UsageError("profiles: they were made for several cadences: give those of one")
    total = steps(texts, len(profiles), budgets)
    if not total or not profiles:
        return list(profiles)
    advance = counter(on_progress, total)
    with tempfile.TemporaryDirectory() as folder:
        pairs = [
            [_arms(profile, Path(folder) / f"{number}.json", size) for size in budgets]
            for number, profile in enumerate(profiles)
        ]
        predicted = [
            [_predicted(model, profile, own, len(texts[:TEXTS])) for own, _ in arms]
            for profile, arms in zip(profiles, pairs, strict=True)
        ]
        measured = _measured(model, texts[:TEXTS], [p for arms in pairs for p in arms], advance)
    numbers = iter(measured)
    return [
        replace(
            profile,
            joint=[
                dict(zip(_ENTRY, (float(size), costs, *next(numbers)), strict=True))
                for size, costs in zip(budgets, expected, strict=True)
            ],
        )
        for profile, expected in zip(profiles, predicted, strict=True)
    ]


def _arms(profile: CostProfile, path: Path, budget: int) -> Pair:
    """Return the settings of a run with a profile's budgets, and with equal ones."""
    if not path.exists():
        profile.save(path)
    equal = CompressionConfig(
        budget,
        Arm("calibrated"),
        interval=profile.interval,
        window=profile.window,
        prompt=profile.prompt,
        profile=path,
    )
    return replace(equal, arm=Arm("calibrated", "cost", "planned")), equal


def _measured(
    model: Any, texts: Sequence[Trajectory], pairs: Sequence[Pair], advance: Callable[[], None]
) -> list[tuple[float, float]]:
    """Return the mean KL per token under both settings of every pair."""
    divergences: list[tuple[list[float], list[float]]] = [([], []) for _ in pairs]
    for text in texts:
        full = full_logits(model, text)
        advance()
        for pair, both in zip(pairs, divergences, strict=True):
            for config, kl in zip(pair, both, strict=True):
                kl += measure_fidelity(model, text, full, config).kl
                advance()
    return [(sum(own) / len(own), sum(equal) / len(equal)) for own, equal in divergences]


def cheapest(profiles: Sequence[CostProfile]) -> CostProfile:
    """Return the profile with the least measured joint KL, geometric mean over budgets.

    With an arithmetic mean the smallest budget alone would decide.

    Args:
        profiles: at least one; if several, all checked at the same budgets.
    """
    return min(
        profiles,
        key=lambda p: sum(math.log(max(entry["measured"], _LEAST_KL)) for entry in p.joint),
    )


def _predicted(model: Any, profile: CostProfile, config: CompressionConfig, texts: int) -> float:
    """Return the summed costs of a profile's budgets over the texts that are replayed."""
    plan = BudgetPlan(config, check_model(model), text_config(model), model_name(model))
    planned = [tokens for layer in plan.planned or () for tokens in layer]
    sizes = torch.tensor(planned, dtype=torch.float64, device="cpu")
    curves = profile.head_curves(list(range(texts)))
    points = torch.tensor(profile.budgets, dtype=torch.float64, device="cpu")
    each: list[Tensor] = [
        interpolate(curve[None], points, size[None])
        for curve, size in zip(curves, sizes, strict=True)
    ]
    return float(torch.stack(each).sum())
