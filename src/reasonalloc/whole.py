"""Whole numbers as users give them."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from reasonalloc.errors import UsageError

#: What a tensor of whole numbers holds.
LARGEST = 2**63 - 1


def whole_number(
    name: str, value: Any, least: int | None = None, unit: str = "", most: int = LARGEST
) -> int:
    """Return a value as a plain ``int``: Python's, numpy's, or a tensor of one number; no bool.

    Args:
        name: of the argument, for messages.
        value: what was given.
        least: the smallest that is allowed, or None.
        unit: what is counted, for messages, such as ``tokens``.
        most: the largest that is allowed.

    Raises:
        UsageError: no whole number, or one that is too small or too large.
    """
    kind = str(getattr(value, "dtype", type(value).__name__))
    try:
        if "bool" in kind or getattr(value, "ndim", 0) > 0:
            raise TypeError
        number = operator.index(value)
    except TypeError:
        counted = f"a whole number of {unit}" if unit else "a whole number"
        raise UsageError(f"{name}={value!r} must be {counted}") from None
    if least is not None and number < least:
        raise UsageError(f"{name}={number} is too small: give at least {least}")
    if number > most:
        raise UsageError(f"{name}={number} is too large: give at most {most}")
    return number


def whole_numbers(name: str, values: Iterable[Any], least: int | None = None) -> list[int]:
    """Return several values as plain ints.

    Raises:
        UsageError: as ``whole_number``, or no sequence.
    """
    try:
        listed = list(values)
    except TypeError:
        raise UsageError(f"{name}={values!r} must be whole numbers, as [64, 128]") from None
    return [whole_number(name, value, least) for value in listed]
