"""Sizes in bytes, and budgets that are given in bytes, as users write them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from reasonalloc.errors import UsageError
from reasonalloc.whole import whole_number

_STEPS = "KMGT"


def parse_size(text: str, name: str = "memory") -> int:
    """Return bytes of ``24GiB`` or ``24G`` (powers of 1024), ``24GB`` (of 1000) or a number.

    Raises:
        UsageError: it cannot be read, or is not positive; ``name`` is what messages call it.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(iB?|B)?|B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"{name}={text!r} is no size: write for example 24GiB or 800MB")
    number, letter, suffix = match.groups()
    base = 1000 if (suffix or "").lower() == "b" else 1024
    power = _STEPS.index(letter.upper()) + 1 if letter else 0
    size = int(float(number) * base**power)
    if size < 1:
        raise UsageError(f"{name}={text!r} is too small: give at least one byte")
    return size


@dataclass(frozen=True)
class ByteBudget:
    """A budget in bytes of keys and values of one sequence, prompts that are pinned apart.

    Attributes:
        text: as it was given.
        size: bytes; or
        share, tokens: a share of the model's own cache at so many tokens.
    """

    text: str
    size: int = 0
    share: float = 0.0
    tokens: int = 0

    @classmethod
    def parse(cls, text: str) -> ByteBudget:
        """Read ``64MiB``, or ``25%@8192``: a quarter of the full cache at 8192 tokens.

        Raises:
            UsageError: something else.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*@\s*(\d+)\s*", text)
        if match is not None:
            share, tokens = float(match[1]) / 100, int(match[2])
            if not 0 < share <= 1 or tokens < 1:
                raise UsageError(f"budget={text!r}: give a share of at most 100% and some tokens")
            return cls(text, share=share, tokens=tokens)
        if re.fullmatch(r"\s*-?[\d.]+\s*", text) or not re.match(r"\s*\d", text):
            raise UsageError(
                f"budget={text!r} must be a whole number of tokens, a size as '64MiB', or a share "
                "of the full cache as '25%@8192'"
            )
        return cls(text, parse_size(text, "budget"))


def read_budget(given: Any) -> int | str:
    """Return a budget in tokens as a number, one in bytes as its text.

    Raises:
        UsageError: neither a whole number nor a ``ByteBudget``.
    """
    if isinstance(given, str):
        try:
            given = int(given)
        except ValueError:
            return ByteBudget.parse(given.strip()).text
    return whole_number("budget", given)
