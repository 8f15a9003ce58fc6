"""Powers that demands are raised to."""

from __future__ import annotations

from reasonalloc.errors import UsageError

_MOST = 16  # of any demand in tokens, such a power is a number


def check_power(owner: str, name: str, power: float, negative: bool = False) -> None:
    """Refuse a power that numbers cannot hold.

    Args:
        owner, name: of the allocator and its parameter, for the message.
        power: what was given.
        negative: whether it may be.

    Raises:
        UsageError: it is too large, too small, or no number.
    """
    least = -_MOST if negative else 0
    if not least <= power <= _MOST:
        raise UsageError(f"{owner}: {name}={power} must lie between {least} and {_MOST}")
