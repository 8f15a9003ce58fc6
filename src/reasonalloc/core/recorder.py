"""What happened in a cache: counts always, details of every event when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reasonalloc.cache import Rows
from reasonalloc.config import RecordLevel


@dataclass(frozen=True)
class Event:
    """One compression of one layer.

    Attributes:
        step: columns (tokens per sequence, padding included) seen by the layer before the event.
        layer: index of the layer in the model.
        budgets: [batch, kv_heads] int64 on the CPU or the device, tokens kept per head.
        positions: [batch, n] int32, of the kept tokens, or None. Head ``h`` owns the
            ``budgets[b, h]`` entries from ``offsets[b, h]`` on.
        offsets: [batch, kv_heads] int64, or None.
    """

    step: int
    layer: int
    budgets: Tensor
    positions: Tensor | None = None
    offsets: Tensor | None = None

    def kept(self, sequence: int, head: int) -> list[int]:
        """Positions that the head kept. Needs ``record="tokens"``."""
        if self.positions is None or self.offsets is None:
            raise ValueError("kept positions were not recorded: use record='tokens'")
        start = int(self.offsets[sequence, head])
        stop = start + int(self.budgets[sequence, head])
        return [int(p) for p in self.positions[sequence, start:stop]]


@dataclass
class Recorder:
    """Collects the events of one cache.

    Attributes:
        level: how much is kept of each event.
        events: the events, in order; empty at level ``off``.
        compressions: number of layer compressions, counted at every level.
    """

    level: RecordLevel = "off"
    events: list[Event] = field(default_factory=list)
    compressions: int = 0

    def copy(self) -> Recorder:
        """The same events in a list of its own."""
        return Recorder(self.level, list(self.events), self.compressions)

    def add(self, step: int, layer: int, budgets: Tensor, load: Callable[[], Rows]) -> None:
        """Note a compression; copies only what the level asks for.

        Args:
            step, layer, budgets: see ``Event``.
            load: returns what the layer holds now.
        """
        self.compressions += 1
        if self.level == "off":
            return
        with torch.no_grad():
            if self.level == "budgets":
                self.events.append(Event(step, layer, budgets.clone()))
            else:
                rows = load()
                batch, heads, n = rows.index.shape
                first = torch.arange(heads, dtype=torch.int64, device=budgets.device) * n
                positions = rows.gather(rows.positions).flatten(1)
                offsets = first.expand(batch, -1)
                self.events.append(Event(step, layer, budgets.clone(), positions, offsets))
