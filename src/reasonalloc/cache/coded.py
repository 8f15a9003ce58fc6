"""The slab of a layer whose older tokens are kept in fewer bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.cache.host import DeferredMax
from reasonalloc.cache.slab import Rows
from reasonalloc.cache.storage import LayerStorage
from reasonalloc.ops import TORCH, Operations
from reasonalloc.ops.codes import RowFormat


@dataclass(frozen=True)
class _Group:
    """The heads of one format.

    Attributes:
        form: the format; heads: their indices.
        first_slot, first_byte: where their runs begin.
        slots: tokens that there is room for.
    """

    form: RowFormat
    heads: list[int]
    first_slot: int
    first_byte: int
    slots: int


def _groups(formats: Sequence[RowFormat], coded: Mapping[RowFormat, int]) -> list[_Group]:
    groups, slot, byte = [], 0, 0
    for form, slots in coded.items():
        heads = [head for head, own in enumerate(formats) if own == form]
        groups.append(_Group(form, heads, slot, byte, slots))
        slot, byte = slot + slots, byte + slots * form.width
    if sum(len(group.heads) for group in groups) != len(formats):
        raise ValueError("a head's format has no room")
    return groups


class CodedSlab(LayerStorage):
    """Keys and values of one layer: a *run* of coded tokens per head, and a *tail* of plain ones.

    New tokens are stored in the tails. At a boundary what stays of them is coded, once, but for the
    last ``window`` tokens; coded tokens are moved as bits. Runs are packed in a pool of bytes:
    first those of all heads with one format, then those with the next; how a row lies there says
    ``RowFormat``. Slots are numbered through: those of the runs, in the same order, then ``room``
    for the tail of each head.

    Args:
        formats: how tokens of each KV head are coded.
        coded: most coded tokens of a sequence, of all heads together that have one format: format
            to tokens, in the order of the pool.
        batch: number of sequences.
        room: most tokens of a tail.
        window: most recent tokens that stay plain.
        state_channels: float32 numbers per slot that belong to the policy; zeros for a new token.
        ops: move tokens.

    Attributes:
        pool: [batch, bytes] uint8.
        coded_slots: most coded tokens of a sequence.
        tail_keys: [batch, kv_heads, room, head_dim]; tail_values: [batch, kv_heads, room,
            value_dim], in the dtype of the formats.
        positions: [batch, slots] int32; state: [batch, slots, channels] float32 or None.
        lengths, offsets: [batch, kv_heads] int64, of the runs, in slots.
        starts: [batch, kv_heads] int64, first byte of each run in the pool.
        tail_lengths: [batch, kv_heads] int64.
    """

    uniform_length = None
    _shared = ("_heads",)

    def __init__(
        self,
        formats: Sequence[RowFormat],
        coded: Mapping[RowFormat, int],
        batch: int,
        room: int,
        window: int,
        *,
        device: torch.device,
        state_channels: int = 0,
        ops: Operations = TORCH,
    ) -> None:
        self.formats, self.kv_heads = tuple(formats), len(formats)
        self._window, self._ops, self._groups = window, ops, _groups(formats, coded)
        self.coded_slots = sum(coded.values())
        size = sum(group.slots * group.form.width for group in self._groups)
        key, value, kv_heads = formats[0].key, formats[0].value, self.kv_heads
        slots = self.coded_slots + kv_heads * room
        self.pool = torch.zeros(batch, size, dtype=torch.uint8, device=device)
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
        self.offsets, self.starts = empty, empty.clone()
        self.lengths, self.tail_lengths = empty.clone(), empty.clone()
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
        tables = [self.offsets, self.starts, self.lengths, self.tail_lengths]
        return sum(t.nbytes for t in [self.positions, self.state, *tables] if t is not None)

    @property
    def held_bytes(self) -> int:
        """Bytes of the tokens that it holds now. Waits for the device."""
        plain = sum(t.shape[-1] * t.element_size() for t in (self.tail_keys, self.tail_values))
        widths = self.lengths.new_tensor([form.width for form in self.formats])
        return int((self.lengths * widths).sum()) + int(self.tail_lengths.sum()) * plain

    @property
    def held(self) -> Tensor:
        """[batch, kv_heads] int64, tokens of each head."""
        return self.lengths + self.tail_lengths

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
        self._mark(slot, position)
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
        decoded = [group.form.decode(self._rows(group)) for group in self._groups]
        keys = [keys.to(self.dtype) for keys, _ in decoded]
        values = [values.to(self.dtype) for _, values in decoded]
        return Rows(
            torch.cat([*keys, self.tail_keys.flatten(1, 2)], dim=1),
            torch.cat([*values, self.tail_values.flatten(1, 2)], dim=1),
            self.positions,
            self.state,
            index.clamp_max(self.slots - 1),
            self.held,
            self.coded_slots,
        )

    def _rows(self, group: _Group) -> Tensor:
        """The runs of a group as [batch, slots, width]."""
        width = group.form.width
        own = self.pool[:, group.first_byte : group.first_byte + group.slots * width]
        return own.view(self.batch, group.slots, width)

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
        offsets = torch.empty_like(lengths)
        for group in self._groups:
            own = lengths[:, group.heads]
            place = own.cumsum(dim=1) - own
            offsets[:, group.heads] = group.first_slot + place
            self.starts[:, group.heads] = group.first_byte + place * group.form.width
            self._code(group, rows, to_code[:, group.heads], place)
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

    def _code(self, group: _Group, rows: Rows, keep: Tensor, place: Tensor) -> None:
        """Write what a group's heads keep: bits that are there, and codes of the others."""
        fresh = group.form.encode(rows.keys[:, rows.coded :], rows.values[:, rows.coded :])
        there = self._rows(group) if rows.coded else fresh[:, :0]
        index = rows.index[:, group.heads]
        new = index - rows.coded + there.shape[1]
        index = torch.where(index < rows.coded, index - group.first_slot, new)
        pool = self._rows(group)
        ops = self._ops if pool.is_contiguous() else TORCH
        # Entries that are not kept may point at the runs of other groups.
        ops.move(
            [(pool, torch.cat([there, fresh], dim=1))], index.masked_fill(~keep, 0), keep, place
        )

    def take_over(self, other: CodedSlab) -> None:
        """Hold what another slab of the same formats, room and batch holds, which is smaller."""
        for own, theirs in zip(self._groups, other._groups, strict=True):
            self._rows(own)[:, : theirs.slots] = other._rows(theirs)
            self._take_slots(own.first_slot, other, theirs.first_slot, theirs.slots)
            heads = own.heads
            moved = own.first_slot - theirs.first_slot
            self.offsets[:, heads] = other.offsets[:, heads] + moved
            moved = own.first_byte - theirs.first_byte
            self.starts[:, heads] = other.starts[:, heads] + moved
        tails = self.kv_heads * self.room
        self._take_slots(self.coded_slots, other, other.coded_slots, tails)
        for name in ("tail_keys", "tail_values", "lengths", "tail_lengths"):
            getattr(self, name).copy_(getattr(other, name))
        self._longest, self._tail = other._longest, other._tail

    def _take_slots(self, first: int, other: CodedSlab, theirs: int, count: int) -> None:
        """Copy what is known of slots, but for keys and values."""
        self.positions[:, first : first + count] = other.positions[:, theirs : theirs + count]
        if self.state is not None and other.state is not None:
            self.state[:, first : first + count] = other.state[:, theirs : theirs + count]

    def remove(self, gone: Tensor) -> int:
        """Drop tokens by their positions; see ``Slab.remove``."""
        rows = self.as_rows()
        keep = rows.without(gone)
        self.rewrite(rows, keep, None, settle=False)
        self._tail = int(self.tail_lengths.max())
        return int(keep.sum(dim=(1, 2)).max())

    def clear(self) -> None:
        """Drop everything; the memory stays."""
        for table in (self.offsets, self.starts, self.lengths, self.tail_lengths):
            table.zero_()
        self._longest, self._tail = 0, 0

    def content(self) -> dict[str, Tensor]:
        """All that it holds, by name."""
        names = ["pool", "tail_keys", "tail_values", "positions"]
        names += ["offsets", "starts", "lengths", "tail_lengths"]
        tensors: dict[str, Tensor] = {name: getattr(self, name) for name in names}
        return tensors if self.state is None else {**tensors, "state": self.state}

    def fill(self, content: Mapping[str, Tensor], equal: bool, room: int) -> None:
        """Take over what another slab of the same shape held; see ``Slab.fill``."""
        self._check_content(content)
        offsets, lengths, tails = (content[n] for n in ("offsets", "lengths", "tail_lengths"))
        packed = inside = bool((lengths >= 0).all())
        for group in self._groups:
            runs = lengths[:, group.heads]
            first = group.first_slot + runs.cumsum(dim=1) - runs
            packed = packed and torch.equal(offsets[:, group.heads], first)
            starts = group.first_byte + (first - group.first_slot) * group.form.width
            packed = packed and torch.equal(content["starts"][:, group.heads], starts)
            inside = inside and bool((runs.sum(dim=1) <= group.slots).all())
        fits = bool((tails >= 0).all() and (tails + room <= self.room).all())
        if not (packed and inside and fits):
            raise ValueError("the runs of the heads do not fit into the storage")
        for name, tensor in self.content().items():
            tensor.copy_(content[name])
        self._longest, self._tail = int(lengths.max()), int(tails.max())
