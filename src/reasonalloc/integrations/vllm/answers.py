"""How long the answers of finished requests were."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

_REMEMBERED = 128  # answers


class Answers:
    """How long answers were: what to expect of the next ones."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}
        self._tails: tuple[list[int], list[int]] | None = None

    def add(self, request_id: str, tokens: int) -> None:
        """An answer ended with so many tokens."""
        self._tokens.pop(request_id, None)
        self._tokens[request_id] = tokens
        if len(self._tokens) > _REMEMBERED:
            del self._tokens[next(iter(self._tokens))]
        self._tails = None

    def take_back(self, request_id: str) -> None:
        """It was no end: the request goes on."""
        if self._tokens.pop(request_id, None) is not None:
            self._tails = None

    def expected(self, tokens: int) -> int | None:
        """Mean tokens of answers that had at least ``tokens``; None if none was that long."""
        if self._tails is None:
            rising = sorted(self._tokens.values())
            self._tails = rising, [*accumulate(reversed(rising))][::-1]
        rising, sums = self._tails
        at = bisect_left(rising, tokens)
        return -(-sums[at] // (len(rising) - at)) if at < len(rising) else None
