"""How long the answers of finished requests were."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_REMEMBERED = 128  # answers


class Answers:
    """How long answers were: what to expect of those that are written."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}
        self._rising: NDArray[np.int64] | None = None

    def add(self, request_id: str, tokens: int) -> None:
        """An answer ended with so many tokens."""
        self._tokens.pop(request_id, None)
        self._tokens[request_id] = tokens
        if len(self._tokens) > _REMEMBERED:
            del self._tokens[next(iter(self._tokens))]
        self._rising = None

    def take_back(self, request_id: str) -> None:
        """It was no end: the request goes on."""
        if self._tokens.pop(request_id, None) is not None:
            self._rising = None

    def going_on(
        self,
        tokens: NDArray[np.int64],
        ahead: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """How likely answers of so many tokens get longer.

        As finished ones of that length did, and as those here already have: they count until
        where they are (Kaplan and Meier 1958). Without these, short answers, which finish first,
        would speak for all.

        Args:
            tokens: [n], of each answer that is written.
            ahead: [k] further tokens.

        Returns:
            [n, k] probabilities; 1 where no finished one was that long.
        """
        if self._rising is None:
            self._rising = np.sort(np.fromiter(self._tokens.values(), np.int64))
        rising = self._rising
        written = np.searchsorted(np.sort(tokens), rising)
        at_risk = np.arange(len(rising), 0, -1) + len(tokens) - written
        share = np.concatenate([[1.0], np.cumprod(1 - 1 / at_risk)])
        now = share[np.searchsorted(rising, tokens)][:, None]
        then = share[np.searchsorted(rising, tokens[:, None] + ahead)]
        return np.where(now > 0, then / np.where(now > 0, now, 1.0), 1.0)
