"""Layers whose older tokens are coded, made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reasonalloc.ops.codes import Field, RowFormat


@dataclass
class MadeCoded:
    """What attention reads of such a layer; see ``CodedView``."""

    pool: Tensor
    formats: tuple[RowFormat, ...]
    coded_slots: int
    starts: Tensor
    offsets: Tensor
    lengths: Tensor
    tail_keys: Tensor
    tail_values: Tensor
    tail_lengths: Tensor
    positions: Tensor
    state: Tensor | None = None

    @property
    def kv_heads(self) -> int:
        return self.tail_keys.shape[1]

    def copy(self) -> MadeCoded:
        own: dict[str, Any] = {
            name: value.clone() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **own)

    def store(self, key: Tensor, value: Tensor, seen: Tensor) -> None:
        """Put one token at the end of every tail."""
        room = self.tail_keys.shape[2]
        for b in range(len(seen)):
            for h in range(self.kv_heads):
                at = int(self.tail_lengths[b, h])
                slot = self.coded_slots + h * room + at
                self.tail_keys[b, h, at] = key[b, h, 0]
                self.tail_values[b, h, at] = value[b, h, 0]
                self.positions[b, slot] = int(seen[b])
                if self.state is not None:
                    self.state[b, slot] = 0.0
        self.tail_lengths += 1


def random_coded(
    seed: int,
    lengths: Sequence[Sequence[tuple[int, int]]],
    kinds: Sequence[tuple[str, str]],
    dims: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    spare: int = 0,
) -> MadeCoded:
    """Runs with gaps between them, and numbers in all slots.

    Args:
        seed: of everything.
        lengths: [batch][kv_heads] coded tokens, and tokens in the tail.
        kinds: of the keys and the values of each head.
        dims, dtypes: of keys and values.
        spare: room in the tails behind the longest.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, heads = len(lengths), len(kinds)
    formats = tuple(
        RowFormat(Field(key, dims[0], dtypes[0]), Field(value, dims[1], dtypes[1]))
        for key, value in kinds
    )
    both = torch.tensor(lengths).view(batch, heads, 2)
    held, tails = both[..., 0].clone(), both[..., 1].clone()
    slots = held + torch.randint(0, 4, (batch, heads), generator=generator)
    coded, room = int(slots.sum(1).max()), int(tails.max()) + spare
    widths = torch.tensor([f.width for f in formats])
    sizes = slots * widths
    pool = torch.zeros(batch, max(int(sizes.sum(1).max()), coded * int(widths[0])) + 1).byte()
    offsets, starts = slots.cumsum(1) - slots, sizes.cumsum(1) - sizes
    for b in range(batch):
        for h in range(heads):
            n, start = int(slots[b, h]), int(starts[b, h])
            rows = formats[h].encode(
                torch.randn(n, dims[0], generator=generator),
                torch.randn(n, dims[1], generator=generator),
            )
            pool[b, start : start + n * formats[h].width] = rows.flatten()
    every = coded + heads * room
    tail = (batch, heads, room)
    return MadeCoded(
        pool=pool,
        formats=formats,
        coded_slots=coded,
        starts=starts,
        offsets=offsets,
        lengths=held,
        tail_keys=torch.randn(*tail, dims[0], generator=generator).to(dtypes[0]),
        tail_values=torch.randn(*tail, dims[1], generator=generator).to(dtypes[1]),
        tail_lengths=tails,
        positions=torch.zeros(batch, every, dtype=torch.int32),
        state=torch.randn(batch, every, 2, generator=generator),
    )
