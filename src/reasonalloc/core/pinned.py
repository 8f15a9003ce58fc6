"""Tokens that stay on top of the budget: the prompt, and later turns if they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: A place in a sequence: one for all, or [batch] int64.
Place = int | Tensor


class Pinned:
    """Spans of positions that every KV head keeps, of every sequence.

    Attributes:
        spans: first position and the one behind the last, of each span, rising.
        most: upper bound of the pinned tokens of a sequence.
        room: the largest that ``most`` has been: what storage was made for.
    """

    def __init__(self) -> None:
        self.spans: list[tuple[Place, Place]] = []
        self.most = self.room = 0
        self._whole = True  # whether every position inside of the spans is held

    def __bool__(self) -> bool:
        return self.most > 0

    @property
    def prefix(self) -> int | None:
        """How many first tokens of every head and sequence are all that is pinned, if known."""
        if len(self.spans) == 1 and self._whole:
            start, end = self.spans[0]
            if isinstance(start, int) and start == 0 and isinstance(end, int) and end == self.most:
                return end
        return None

    def add(self, start: Place, end: Place, most: int) -> None:
        """Pin positions ``start`` to ``end``, at most ``most`` of a sequence."""
        if most:
            self.spans.append((start, end))
            self.most += most
            self.room = max(self.room, self.most)

    def mask(self, positions: Tensor) -> Tensor:
        """[batch, kv_heads, n] bool: which tokens are pinned, by their ``positions``."""
        pinned = torch.zeros_like(positions, dtype=torch.bool)
        for start, end in self.spans:
            first, last = _column(start), _column(end)
            pinned |= (positions >= first) & (positions < last)
        return pinned

    def go_back(self, seen: Place, holes: bool) -> None:
        """Forget positions from ``seen`` on.

        Args:
            seen: tokens that are left of each sequence.
            holes: whether others may have been dropped as well.
        """
        self._whole = self._whole and not holes
        spans = [(_least(start, seen), _least(end, seen)) for start, end in self.spans]
        most = [_length(start, end) for start, end in spans]
        self.spans = [span for span, length in zip(spans, most, strict=True) if length]
        self.most = min(self.most, sum(most))

    def copy(self, sequences: Tensor | None = None) -> Pinned:
        """Return the same in memory of its own, of these ``sequences`` [n] int64."""
        twin = copy.copy(self)
        twin.spans = [(_select(a, sequences), _select(b, sequences)) for a, b in self.spans]
        return twin

    def content(self) -> dict[str, Any]:
        """Return all of it as numbers that JSON can hold."""
        return {
            "spans": [[_plain(start), _plain(end)] for start, end in self.spans],
            "most": self.most,
            "room": self.room,
            "whole": self._whole,
        }

    def fill(self, content: Any, batch: int, columns: int, device: torch.device) -> None:
        """Take over what ``content`` said.

        Args:
            content: read from a file, and not trusted; None: nothing is pinned.
            batch, columns: of the text.
            device: of the layer.

        Raises:
            ValueError, KeyError, TypeError: something is missing or does not fit.
        """
        self.__init__()  # type: ignore[misc]
        if content is None:
            return
        for start, end in content["spans"]:
            first, last = (_read(place, batch, columns, device) for place in (start, end))
            self.spans.append((first, last))
        self.most, self.room = int(content["most"]), int(content["room"])
        self._whole = bool(content["whole"])
        least = sum(_length(a, b) for a, b in self.spans)
        if not least <= self.most <= self.room or any(_length(b, a) > 0 for a, b in self.spans):
            raise ValueError(f"{self.most} pinned tokens cannot be")


def _column(place: Place) -> Place:
    return place[:, None, None] if isinstance(place, Tensor) else place


def _least(place: Place, seen: Place) -> Place:
    if isinstance(place, int) and isinstance(seen, int):
        return min(place, seen)
    known = place if isinstance(place, Tensor) else seen
    assert isinstance(known, Tensor)
    first, second = (
        torch.as_tensor(x, dtype=known.dtype, device=known.device) for x in (place, seen)
    )
    return torch.minimum(first, second)


def _length(start: Place, end: Place) -> int:
    difference = end - start
    return int(difference.max()) if isinstance(difference, Tensor) else difference


def _select(place: Place, sequences: Tensor | None) -> Place:
    if isinstance(place, int):
        return place
    return place.clone() if sequences is None else place[sequences.to(place.device)]


def _plain(place: Place) -> int | list[int]:
    return place.tolist() if isinstance(place, Tensor) else place


def _read(place: Any, batch: int, columns: int, device: torch.device) -> Place:
    numbers: Sequence[Any] = place if isinstance(place, list) else [place]
    if any(type(n) is not int or not 0 <= n <= columns for n in numbers):
        raise ValueError(f"{place!r} is no place in a text of {columns} tokens")
    if not isinstance(place, list):
        return int(place)
    if len(place) != batch:
        raise ValueError(f"{len(place)} places for {batch} sequences")
    return torch.tensor(place, dtype=torch.int64, device=device)
