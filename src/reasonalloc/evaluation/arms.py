"""Arms as they are given: one text with commas, a list of texts, or ``Arm`` objects."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

from reasonalloc.config import Arm, Step, parse_arm, preset_name, split_arms
from reasonalloc.errors import UsageError, unknown_name
from reasonalloc.sizes import read_budget


def read_arms(given: str | Arm | Iterable[str | Arm]) -> list[str]:
    """Return the names of arms, checked, none twice: presets by their names, others as three parts.

    Args:
        given: names separated by commas, or names and ``Arm`` objects.

    Raises:
        UsageError: none, or an unknown one.
    """
    if not isinstance(given, Iterable) and not isinstance(given, Arm):
        raise UsageError(f"arms={given!r} must be names or Arm objects, as ['full', 'rkv']")
    names = []
    for item in [given] if isinstance(given, str | Arm) else given:
        if not isinstance(item, str | Arm):
            raise UsageError(f"arms: {item!r} is neither a name nor an Arm object")
        for name in [str(item)] if isinstance(item, Arm) else split_arms(item):
            arm = parse_arm(name)
            names.append(name if arm is None else preset_name(arm))
            if arm is not None:
                check_names(arm)
    if not names:
        raise UsageError("arms is empty: name at least one, as rkv,snapkv")
    return list(dict.fromkeys(names))


def list_budgets(given: int | str | Iterable[int | str]) -> list[int | str]:
    """Return budgets, none twice: those in tokens as numbers, those in bytes as texts.

    Args:
        given: one or several; texts may hold several, separated by commas.

    Raises:
        UsageError: none, or something that is no budget.
    """
    several = [given] if isinstance(given, str) or not isinstance(given, Iterable) else given
    budgets = []
    for item in several:
        parts = item.split(",") if isinstance(item, str) else [item]
        budgets += [read_budget(part) for part in parts]
    if not budgets:
        raise UsageError("budgets is empty: give at least one, as (64, '4MiB')")
    return list(dict.fromkeys(budgets))


def check_names(arm: Arm) -> None:
    """Refuse unknown names and wrong parameters.

    Raises:
        UsageError: says what there is.
    """
    from reasonalloc.allocators.head import HEAD_ALLOCATORS
    from reasonalloc.allocators.layer import LAYER_ALLOCATORS
    from reasonalloc.policies import POLICIES

    POLICIES.create(arm.policy)
    LAYER_ALLOCATORS.create(arm.layers)
    HEAD_ALLOCATORS.create(arm.heads)


def check_decoding(step: str, attention: str) -> None:
    """Refuse unknown names; whether they work is for the loaded model to say.

    Raises:
        UsageError: says what there is.
    """
    from reasonalloc.attention import choose_backend

    if step not in get_args(Step):
        raise unknown_name("step", step, get_args(Step))
    choose_backend(attention)
