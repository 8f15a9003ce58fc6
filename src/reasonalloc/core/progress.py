"""The counters of one layer: what it has seen, what it holds at most, when its boundaries were."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reasonalloc.core.cadence import Cadence
from reasonalloc.core.pinned import Pinned

_COUNTERS = ("columns", "since", "evicted_at", "prompt_columns")


class Progress:
    """Counts tokens on the host; where sequences differ, on the device too.

    A *column* is a place in ``input_ids``, padding included.

    Args:
        cadence: the boundaries.

    Attributes:
        columns: tokens per sequence so far, padding included.
        seen: real tokens per sequence: one number while nothing is padding and no step has fixed
            addresses, else [batch] int64 on the device.
        prompt: real tokens of the first prefill, likewise.
        prompt_columns: columns of the first prefill.
        held: upper bound of the tokens that a sequence holds, over all heads, besides pinned ones.
        pinned: tokens that stay on top of the budget.
        evicted_at: columns at the latest compression that may have evicted tokens; 0 if none did.
        unsettled: a step with fixed addresses has run that ``step`` has not been told of.
    """

    def __init__(self, cadence: Cadence) -> None:
        self._cadence = cadence
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.columns = self.prompt_columns = self.held = self.evicted_at = self._since = 0
        self.seen: int | Tensor = 0
        self.prompt: int | Tensor = 0
        self.pinned = Pinned()
        self.unsettled = False
        self._boundaries: list[int] = []  # columns, from the latest compression on

    @property
    def until_boundary(self) -> int:
        """Decode steps that are left before the next boundary."""
        return self._cadence.interval - self._since

    @property
    def at_boundary(self) -> bool:
        """Whether the latest token completed an interval or a prefill."""
        return self._since == 0

    def per_sequence(self, batch: int, device: torch.device) -> Tensor:
        """Return ``seen`` as [batch] int64."""
        if isinstance(self.seen, Tensor):
            return self.seen
        return torch.full((batch,), self.seen, dtype=torch.int64, device=device)

    def spread(self, batch: int, device: torch.device) -> Tensor:
        """Keep ``seen`` as a tensor from now on, at one address."""
        self.seen = self.per_sequence(batch, device)
        return self.seen

    def note(self, valid: Tensor | None) -> None:
        """Count one new token on the device, where it lies.

        Args:
            valid: [batch, 1] bool, false where it is padding; None if all are real.
        """
        self.seen += 1 if valid is None else valid.squeeze(1).long()
        self.unsettled = True

    def step(self, kv_heads: int) -> bool:
        """Count a decode step on the host.

        Returns:
            Whether it completes an interval.
        """
        self.unsettled = False
        self.columns += 1
        self.held += kv_heads
        self._since += 1
        if self._since == self._cadence.interval:
            self._since = 0
            self._boundaries.append(self.columns)
        return self._since == 0

    def prefill(self, columns: int, valid: Tensor | None, held: int, replayed: bool) -> bool:
        """Count several tokens at once.

        Args:
            columns: how many per sequence.
            valid: [batch, columns] bool, false at padding; None if all are real.
            held: upper bound of the real ones of a sequence that are not pinned, times the KV
                heads.
            replayed: they are decode steps, which end at a boundary only if they complete an
                interval; a prefill always does.

        Returns:
            Whether they end at a boundary.
        """
        real: int | Tensor = columns if valid is None else valid.sum(dim=1)
        if self.columns == 0:
            self.prompt_columns, self.prompt = columns, real
        self.seen = self.seen + real
        self.columns += columns
        self.held += held
        self._since = (self._since + columns) % self._cadence.interval if replayed else 0
        if self._since == 0:
            self._boundaries.append(self.columns)
        return self._since == 0

    def compressed(self, total: int) -> None:
        """Note a compression, at a boundary, that left at most ``total`` tokens."""
        self.evicted_at, self._boundaries = self.columns, [self.columns]
        self.held = min(self.held, total)

    def go_back(self, seen: int | Tensor, held: int, columns: int) -> None:
        """Forget tokens that are no longer part of the text.

        Args:
            seen: real tokens that are left of each sequence: one number, or [batch] int64.
            held: upper bound of the tokens that a sequence still holds, besides pinned ones.
            columns: of the text, not before ``evicted_at``.
        """
        self.held = held
        if isinstance(self.seen, Tensor) and isinstance(seen, Tensor):
            self.seen.copy_(seen)  # in place: a captured step reads it there
        else:
            self.seen = seen.clone() if isinstance(seen, Tensor) else seen
        if isinstance(self.prompt, Tensor) or isinstance(self.seen, Tensor):
            device = self.seen.device if isinstance(self.seen, Tensor) else None
            prompt, now = (
                torch.as_tensor(x, dtype=torch.int64, device=device)
                for x in (self.prompt, self.seen)
            )
            self.prompt = torch.minimum(prompt, now)
        else:
            self.prompt = min(self.prompt, self.seen)
        if columns < self.columns:
            self.columns = columns
            self._since = self._steps_since_boundary(columns)

    def _steps_since_boundary(self, columns: int) -> int:
        """What was counted when the text had so many columns, or 0 if it was in a prefill."""
        self._boundaries = [place for place in self._boundaries if place <= columns]
        interval = self._cadence.interval
        since = columns - self._boundaries[-1] if self._boundaries else interval
        if since >= interval:
            self._boundaries.append(columns)
            return 0
        return since

    def copy(self, sequences: Tensor | None = None) -> Progress:
        """Return the same numbers in memory of their own, of these ``sequences`` [n] int64."""
        twin = copy.copy(self)
        twin._boundaries = list(self._boundaries)
        twin.pinned = self.pinned.copy(sequences)
        for name in ("seen", "prompt"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(twin, name, value.clone() if sequences is None else value[sequences])
        return twin

    def content(self) -> dict[str, Any]:
        """Return all of it as numbers that JSON can hold."""
        numbers: dict[str, Any] = {
            "columns": self.columns,
            "since": self._since,
            "prompt_columns": self.prompt_columns,
            "evicted_at": self.evicted_at,
            "boundaries": self._boundaries,
            **({"pinned": self.pinned.content()} if self.pinned.room else {}),
        }
        for name, value in (("seen", self.seen), ("prompt", self.prompt)):
            numbers[name] = value.tolist() if isinstance(value, Tensor) else value
        return numbers

    def check(self, numbers: Mapping[str, Any]) -> None:
        """Refuse numbers, read from a file, that cannot be.

        Raises:
            ValueError, KeyError, TypeError: something is missing or does not fit.
        """
        counts = {name: int(numbers[name]) for name in _COUNTERS}
        boundaries = [int(place) for place in numbers["boundaries"]]
        if not 0 <= counts["since"] < self._cadence.interval or not (
            0 <= counts["evicted_at"] <= counts["columns"]
            and 0 <= counts["prompt_columns"] <= counts["columns"]
        ):
            raise ValueError(f"counters {counts} cannot be")
        if boundaries != sorted(boundaries) or not all(
            0 <= place <= counts["columns"] for place in boundaries
        ):
            raise ValueError(f"boundaries {boundaries} cannot be")

    def fill(self, numbers: Mapping[str, Any], batch: int, held: int, device: torch.device) -> None:
        """Take over what ``content`` said, after ``check``.

        Args:
            numbers: read from a file.
            batch: sequences.
            held: upper bound of the tokens that a sequence holds, besides pinned ones.
            device: of the layer.

        Raises:
            ValueError, KeyError, TypeError: something is missing or does not fit.
        """
        self.columns, self._since = int(numbers["columns"]), int(numbers["since"])
        self.seen = _count(numbers["seen"], batch, self.columns, device)
        self.prompt = _count(numbers["prompt"], batch, self.columns, device)
        self.prompt_columns = int(numbers["prompt_columns"])
        self.evicted_at = int(numbers["evicted_at"])
        self._boundaries = [int(place) for place in numbers["boundaries"]]
        self.held = held

    def fill_pinned(self, numbers: Mapping[str, Any], batch: int, device: torch.device) -> None:
        """Take over the pinned tokens of ``content``, before a layer is allocated for them."""
        self.pinned.fill(numbers.get("pinned"), batch, int(numbers["columns"]), device)


def _count(value: Any, batch: int, most: int, device: torch.device) -> int | Tensor:
    """A number of tokens, for all sequences or each, read from a file."""
    numbers = value if isinstance(value, list) else [value]
    if any(not isinstance(n, int) or not 0 <= n <= most for n in numbers):
        raise ValueError(f"{value!r} is no number of tokens up to {most}")
    if not isinstance(value, list):
        return int(value)
    if len(value) != batch:
        raise ValueError(f"{len(value)} numbers of tokens for {batch} sequences")
    return torch.tensor(value, dtype=torch.int64, device=device)
