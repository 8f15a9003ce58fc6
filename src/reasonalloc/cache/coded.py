"""The slab of a layer whose older tokens are kept in fewer bits."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from reasonalloc.cache.host import DeferredMax
from reasonalloc.cache.slab import Rows
from reasonalloc.ops import TORCH, Operations
from reasonalloc.ops.codes import RowFormat


class CodedSlab:
    """Keys and values of one layer: a *run* of coded tokens per head, and a *tail* of plain ones.

    New tokens are stored in the tails. At a boundary what stays of them is coded, once, but for the
    last ``window`` tokens; coded tokens are moved as bits. Runs are packed in a pool of bytes, head
    by head; how a row lies there says ``RowFormat``. Slots are numbered through: those of the runs,
    then ``room`` for the tail of each head.

    Args:
        batch, kv_heads: number of sequences and of KV heads.
        coded_slots: most coded tokens of a sequence, all heads together.
        room: most tokens of a tail.
        formats: per KV head, all of one width (see ``pool``).
        window: most recent tokens that stay plain.
        state_channels: float32 numbers per slot that belong to the policy; zeros for a new token.
        ops: move tokens.

    Attributes:
        pool: [batch, coded_slots * width] uint8.
        tail_keys: [batch, kv_heads, room, head_dim]; tail_values: [batch, kv_heads, room,
            value_dim], in the dtype of the formats.
        positions: [batch, slots] int32; state: [batch, slots, channels] float32 or None.
        lengths, offsets: [batch, kv_heads] int64, of the runs, in slots.
        tail_lengths: [batch, kv_heads] int64.
    """

    uniform_length = None

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        coded_slots: int,
        room: int,
        formats: tuple[RowFormat, ...],
        window: int,
        *,
        device: torch.device,
        state_channels: int = 0,
        ops: Operations = TORCH,
    ) -> None:
        self.kv_heads, self.coded_slots, self.formats = kv_heads, coded_slots, formats
        self._format, self._window, self._ops = formats[0], window, ops
        key, value = self._format.key, self._format.value
        if len(set(formats)) != 1 or len(formats) != kv_heads:
            raise ValueError("one format for all heads of a layer")
        slots = coded_slots + kv_heads * room
        self.pool = torch.zeros(
            batch, coded_slots * self._format.width, dtype=torch.uint8, device=device
        )
        # Zeros, not empty: a masked slot's weight is 0, and 0 times garbage may be NaN.
        self.tail_keys = torch.zeros(batch, kv_heads, room, key.dim, dtype=key.dtype, device=device)
        self.tail_values = torch.zeros(
            batch, kv_heads, room, value.dim, dtype=value.dtype, device=device
        )
        self.positions = torch.zeros(batch, slots, dtype=torch.int32, device=device)
        self.state = (
            torch.zeros(batch, slots, state_channels, dtype=torch.float32, device=device)
            if state_channels
            else None
        )
        empty = torch.zeros(batch, kv_heads, dtype=torch.int64, device=device)
        self.offsets, self.lengths, self.tail_lengths = empty, empty.clone(), empty.clone()
        self._sequences = torch.arange(batch, device=device)[:, None]
        self._heads = torch.arange(kv_heads, device=device)[None]
        self._longest: DeferredMax | int = 0  # of the runs
        self._tail = 0  # upper bound of the tails' lengths

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.pool.shape[0]

    @property
    def slots(self) -> int:
        """Most tokens of a sequence, all heads together."""
        return self.positions.shape[1]

    @property
    def room(self) -> int:
        """Most tokens of a tail."""
        return self.tail_keys.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values outside of the pool."""
        return self.tail_keys.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.pool.device

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values, and the numbers that scale them."""
        return self.pool.nbytes + self.tail_keys.nbytes + self.tail_values.nbytes

    @property
    def bookkeeping_bytes(self) -> int:
        """Bytes allocated for everything else."""
        tables = [self.positions, self.offsets, self.lengths, self.tail_lengths, self.state]
        return sum(t.nbytes for t in tables if t is not None)

    @property
    def held_bytes(self) -> int:
        """Bytes of the tokens that it holds now. Waits for the device."""
        plain = sum(t.shape[-1] * t.element_size() for t in (self.tail_keys, self.tail_values))
        coded, tail = int(self.lengths.sum()), int(self.tail_lengths.sum())
        return coded * self._format.width + tail * plain

    @property
    def held(self) -> Tensor:
        """[batch, kv_heads] int64, tokens of each head."""
        return self.lengths + self.tail_lengths

    @property
    def starts(self) -> Tensor:
        """[batch, kv_heads] int64, first byte of each head's run in the pool."""
        return self.offsets * self._format.width

    def make_ragged(self) -> None:
        """Nothing: runs are described by device tables always."""

    def append(
        self, key: Tensor, value: Tensor, position: int | Tensor, valid: Tensor | None
    ) -> None:
        """Add one token to every tail: ``store`` it and ``count`` it."""
        if self._tail >= self.room:
            raise RuntimeError(f"a tail of {self.room} tokens is full: compress before appending")
        self.store(key, value, position, valid)
        self.count()

    def count(self) -> None:
        """The host's part of ``append``: every tail may be longer by one token."""
        self._tail += 1

    def store(
        self, key: Tensor, value: Tensor, position: int | Tensor, valid: Tensor | None
    ) -> None:
        """The device's part of ``append``; reads no number of the host. See ``Slab.store``."""
        place = (self._sequences, self._heads, self.tail_lengths)
        self.tail_keys.index_put_(place, key[:, :, 0])
        self.tail_values.index_put_(place, value[:, :, 0])
        slot = (self._sequences, self._tails + self.tail_lengths)
        if isinstance(position, Tensor):
            self.positions.index_put_(slot, position[:, None].to(torch.int32))
        else:
            self.positions.index_put_(slot, self.positions.new_full((), position))
        if self.state is not None:
            self.state.index_put_(slot, self.state.new_zeros(()))
        self.tail_lengths += 1 if valid is None else valid.long()

    @property
    def _tails(self) -> Tensor:
        """[1, kv_heads] int64, first slot of each tail."""
        return self.coded_slots + self._heads * self.room

    def as_rows(self) -> Rows:
        """Everything that the slab holds, decoded, as rows that point into a copy."""
        if isinstance(self._longest, DeferredMax):
            self._longest = self._longest.get()
        n = min(self._longest, self.coded_slots) + min(self._tail, self.room)
        index = torch.arange(n, device=self.device)
        coded = self.lengths[..., None]
        behind = self._tails[..., None] + (index - coded).clamp_min(0)
        index = torch.where(index < coded, self.offsets[..., None] + index, behind)
        keys, values = self._format.decode(self._rows)
        return Rows(
            torch.cat([keys.to(self.dtype), self.tail_keys.flatten(1, 2)], dim=1),
            torch.cat([values.to(self.tail_values.dtype), self.tail_values.flatten(1, 2)], dim=1),
            self.positions,
            self.state,
            index.clamp_max(self.slots - 1),
            self.held,
            self.coded_slots,
        )

    @property
    def _rows(self) -> Tensor:
        """The pool as [batch, coded_slots, width]."""
        return self.pool.view(self.batch, self.coded_slots, self._format.width)

    def rewrite(
        self, rows: Rows, keep: Tensor, uniform_length: int | None, settle: bool = True
    ) -> None:
        """Replace the content by the kept tokens of ``rows``.

        Args:
            rows: of ``as_rows``, or of new tokens behind those.
            keep: [batch, kv_heads, n] bool.
            uniform_length: of no use here.
            settle: code the kept tokens but the last ``window``; else those alone that are coded
                stay so.
        """
        was_coded = rows.index < rows.coded
        behind = keep.flip(-1).cumsum(dim=-1).flip(-1)  # kept tokens from here on
        to_code = keep & (was_coded | (behind > self._window)) if settle else keep & was_coded
        to_tail = keep & ~to_code
        lengths, tails = to_code.sum(dim=-1), to_tail.sum(dim=-1)
        offsets = lengths.cumsum(dim=1) - lengths
        fresh = self._format.encode(rows.keys[:, rows.coded :], rows.values[:, rows.coded :])
        codes = torch.cat([self._rows[:, : rows.coded], fresh], dim=1)
        self._ops.move([(self._rows, codes)], rows.index, to_code, offsets)
        own = torch.zeros_like(offsets) + self._heads * self.room
        plain = [
            (self.tail_keys.flatten(1, 2), rows.keys),
            (self.tail_values.flatten(1, 2), rows.values),
        ]
        self._ops.move(plain, rows.index, to_tail, own)
        moved = [(self.positions, rows.positions)]
        if self.state is not None and rows.state is not None:
            moved.append((self.state, rows.state))
        self._ops.move(
            moved,
            torch.cat([rows.index, rows.index], dim=1),
            torch.cat([to_code, to_tail], dim=1),
            torch.cat([offsets, self.coded_slots + own], dim=1),
        )
        self.offsets.copy_(offsets)
        self.lengths.copy_(lengths)
        self.tail_lengths.copy_(tails)
        self._longest = DeferredMax(lengths)
        fresh_columns = (rows.keys.shape[1] - rows.coded) // self.kv_heads - self.room
        most = self._window if settle else self._tail + fresh_columns
        self._tail = min(most, self.room, rows.index.shape[-1])

    def remove(self, gone: Tensor) -> int:
        """Drop tokens by their positions; see ``Slab.remove``."""
        rows = self.as_rows()
        keep = rows.without(gone)
        self.rewrite(rows, keep, None, settle=False)
        self._tail = int(self.tail_lengths.max())
        return int(keep.sum(dim=(1, 2)).max())

    def clear(self) -> None:
        """Drop everything; the memory stays."""
        for table in (self.offsets, self.lengths, self.tail_lengths):
            table.zero_()
        self._longest, self._tail = 0, 0

    def copy(self, sequences: Tensor | None = None) -> CodedSlab:
        """The same content in memory of its own; see ``Slab.copy``."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and name != "_heads":
                setattr(twin, name, value.clone() if sequences is None else value[sequences])
        if sequences is not None:
            twin._sequences = self._sequences.new_tensor(range(len(sequences)))[:, None]
        return twin

    def content(self) -> dict[str, Tensor]:
        """All that it holds, by name."""
        names = ("pool", "tail_keys", "tail_values", "positions")
        tables = ("offsets", "lengths", "tail_lengths", *(("state",) if self._channels else ()))
        return {name: getattr(self, name) for name in (*names, *tables)}

    @property
    def _channels(self) -> int:
        return 0 if self.state is None else self.state.shape[-1]

    def fill(self, content: Mapping[str, Tensor], equal: bool, room: int) -> None:
        """Take over what another slab of the same shape held; see ``Slab.fill``."""
        own = self.content()
        for name, tensor in own.items():
            given = content.get(name)
            if given is None or given.shape != tensor.shape or given.dtype != tensor.dtype:
                theirs = None if given is None else (tuple(given.shape), given.dtype)
                raise ValueError(f"{name} is {theirs}, not {(tuple(tensor.shape), tensor.dtype)}")
        offsets, lengths, tails = (content[n] for n in ("offsets", "lengths", "tail_lengths"))
        packed = torch.equal(offsets, lengths.cumsum(dim=1) - lengths)
        inside = bool((lengths >= 0).all() and (lengths.sum(dim=1) <= self.coded_slots).all())
        fits = bool((tails >= 0).all() and (tails + room <= self.room).all())
        if not (packed and inside and fits):
            raise ValueError("the runs of the heads do not fit into the storage")
        for name, tensor in own.items():
            tensor.copy_(content[name])
        self._longest, self._tail = int(lengths.max()), int(tails.max())
