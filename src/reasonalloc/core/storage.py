"""What storage a layer under a budget gets, and how much of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.cache import AnySlab, CodedSlab, Slab
from reasonalloc.config import CompressionConfig
from reasonalloc.core.cadence import most_coded, slots
from reasonalloc.ops import Operations
from reasonalloc.ops.codes import RowFormat, row_format


@dataclass(frozen=True)
class Storage:
    """The tokens of a layer: as the model has them, or older ones in fewer bits.

    Attributes:
        total: tokens that all KV heads together keep after a compression.
        config: window, interval, how tokens are kept.
        planned: tokens that each KV head was given beforehand, [kv_heads], or None.
        formats: how older tokens of each KV head are kept, [kv_heads], if that is planned.
        channels: numbers per token that the policy keeps.
        ops: what moves tokens.
    """

    total: int
    config: CompressionConfig
    planned: Sequence[int] | None
    formats: Sequence[str] | None
    channels: int
    ops: Operations

    @property
    def most(self) -> int:
        """Tokens of all heads together beyond which the layer is compressed."""
        if self.formats is None:
            return self.total
        return len(self.planned or ()) * min(self.planned or (0,))

    @property
    def coded(self) -> bool:
        """Whether older tokens are kept in fewer bits."""
        return self.config.coded or self.formats is not None

    def slots(self, kv_heads: int, pinned: int) -> int:
        """Slots of a sequence, all heads together, with room for ``pinned`` tokens of each."""
        window = self.config.window if self.coded else None
        return slots(self.total, kv_heads, self.config.interval, pinned, window)

    def empty(self, key: Tensor, value: Tensor, pinned: int) -> AnySlab:
        """Return storage that holds nothing yet.

        Args:
            key: [batch, kv_heads, q, head_dim], whose sizes, dtype and device it is for.
            value: [batch, kv_heads, q, value_dim].
            pinned: tokens of every head that it must have room for on top of the total.
        """
        batch, kv_heads, _, head_dim = key.shape
        config, dims = self.config, (head_dim, value.shape[-1])
        if self.coded:
            kinds = self.formats or [config.kv_dtype] * kv_heads
            formats = [row_format(kind, *dims, key.dtype) for kind in kinds]
            return CodedSlab(
                formats,
                self._coded_tokens(formats, pinned),
                batch,
                config.window + config.interval,
                config.window,
                device=key.device,
                state_channels=self.channels,
                ops=self.ops,
            )
        return Slab(
            batch,
            kv_heads,
            self.slots(kv_heads, pinned),
            *dims,
            dtype=key.dtype,
            device=key.device,
            state_channels=self.channels,
            ops=self.ops,
        )

    def _coded_tokens(self, formats: Sequence[RowFormat], pinned: int) -> dict[RowFormat, int]:
        """The most coded tokens of all heads together that have each format."""
        window = self.config.window
        if self.formats is None or self.planned is None:
            return {formats[0]: most_coded(self.total, len(formats), window, pinned)}
        room: dict[RowFormat, int] = {}
        for form, tokens in zip(formats, self.planned, strict=True):
            room[form] = room.get(form, 0) + most_coded(tokens, 1, window, pinned)
        return room


def check_positions(slab: AnySlab, seen: Tensor) -> None:
    """Refuse positions that do not rise inside a run, or lie outside of the text.

    Args:
        slab: what holds them.
        seen: [batch] int64, tokens of each sequence so far.

    Raises:
        ValueError: there are such.
    """
    rows = slab.as_rows()
    held = torch.arange(rows.index.shape[-1], device=seen.device) < rows.lengths[..., None]
    places = rows.gather(rows.positions)
    inside = (places >= 0) & (places < seen[:, None, None])
    rising = places[..., 1:] > places[..., :-1]
    if not bool((inside | ~held).all()) or not bool((rising | ~held[..., 1:]).all()):
        raise ValueError("positions do not rise, or lie outside of the text")
