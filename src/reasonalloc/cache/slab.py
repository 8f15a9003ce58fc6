"""The slab: ragged storage of one layer, allocated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.cache.host import DeferredMax
from reasonalloc.cache.storage import LayerStorage
from reasonalloc.ops import TORCH, Operations
from reasonalloc.ops.torch import take


@dataclass
class Rows:
    """Tokens of a layer as rows per (sequence, KV head) that point into flat storage.

    Attributes:
        keys: [batch, m, head_dim], values: [batch, m, value_dim], the storage pointed into.
        positions: [batch, m] int32, position of each token in its sequence.
        state: [batch, m, channels] float32, what the policy keeps per token, or None.
        index: [batch, kv_heads, n] int64, into dimension 1 of the storage; the first ``lengths``
            entries of a row are its tokens in the order of their positions.
        lengths: [batch, kv_heads] int64.
        coded: how many of the first entries of the storage are kept in fewer bits.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    state: Tensor | None
    index: Tensor
    lengths: Tensor
    coded: int = 0

    @property
    def held(self) -> Tensor:
        """[batch, kv_heads, n] bool: entries that are tokens."""
        return (
            torch.arange(self.index.shape[-1], device=self.index.device) < self.lengths[..., None]
        )

    def without(self, gone: Tensor) -> Tensor:
        """[batch, kv_heads, n] bool: tokens but those at some positions.

        Args:
            gone: [batch, positions] bool, true for positions to be dropped; longer ones stay.
        """
        positions = self.gather(self.positions).long().flatten(1)
        known = positions < gone.shape[1]
        # Entries behind a row's tokens may point at anything.
        hit = gone.gather(1, positions.clamp(0, gone.shape[1] - 1)) & known
        return self.held & ~hit.view(self.index.shape)

    def gather(self, flat: Tensor) -> Tensor:
        """[batch, m, ...] storage as [batch, kv_heads, n, ...] rows; padding repeats tokens."""
        batch, heads, n = self.index.shape
        taken = take(flat, self.index.reshape(batch, heads * n))
        return taken.view(batch, heads, n, *flat.shape[2:])


class Slab(LayerStorage):
    """Keys and values of one layer: ``slots`` per sequence, shared by the heads as runs.

    Head ``h`` of sequence ``b`` owns the slots ``[offset, offset + length)``, in the order of
    positions, with room to grow behind. Physical lengths live here; logical positions are
    ``positions``. While every run is known to have one length, that length is a host number
    (``uniform_length``) and no table on the device is touched.

    Args:
        batch, kv_heads: number of sequences and of KV heads.
        slots: slots per sequence, at least ``kv_heads`` times the longest run in uniform use.
        head_dim, value_dim: widths of keys and values.
        state_channels: float32 numbers per slot that belong to the policy; zeros for a new token.
        ops: move tokens.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        slots: int,
        head_dim: int,
        value_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        state_channels: int = 0,
        ops: Operations = TORCH,
    ) -> None:
        self.kv_heads = kv_heads
        self.slots = slots
        # Zeros, not empty: a masked slot's weight is 0, and 0 times garbage may be NaN.
        self.keys = torch.zeros(batch, slots, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros(batch, slots, value_dim, dtype=dtype, device=device)
        self.positions = torch.zeros(batch, slots, dtype=torch.int32, device=device)
        self.state = (
            torch.zeros(batch, slots, state_channels, dtype=torch.float32, device=device)
            if state_channels
            else None
        )
        self._offsets = torch.zeros(batch, kv_heads, dtype=torch.int64, device=device)
        self._lengths = torch.zeros(batch, kv_heads, dtype=torch.int64, device=device)
        self._ops = ops
        self._run = slots // kv_heads
        self._sequences = torch.arange(batch, device=device)[:, None]
        self.uniform_length: int | None = 0
        self._longest: DeferredMax | int = 0
        self._appended = 0

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.keys.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.keys.device

    @property
    def held(self) -> Tensor:
        """[batch, kv_heads] int64, tokens of each head."""
        return self.lengths

    @property
    def held_bytes(self) -> int:
        """Bytes of the tokens that it holds now. Waits for the device."""
        width = sum(t.shape[-1] * t.element_size() for t in (self.keys, self.values))
        return int(self.lengths.sum()) * width

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def bookkeeping_bytes(self) -> int:
        """Bytes allocated for everything else."""
        tensors = [self.positions, self._offsets, self._lengths, self.state]
        return sum(t.nbytes for t in tensors if t is not None)

    @property
    def offsets(self) -> Tensor:
        """[batch, kv_heads] int64, first slot of each run."""
        if self.uniform_length is not None:
            starts = torch.arange(self.kv_heads, device=self.keys.device) * self._run
            return starts.expand(self.batch, -1)
        return self._offsets

    @property
    def lengths(self) -> Tensor:
        """[batch, kv_heads] int64, tokens of each run."""
        if self.uniform_length is not None:
            return torch.full_like(self._lengths, self.uniform_length)
        return self._lengths

    @property
    def longest(self) -> int:
        """Upper bound of the longest run, known to the host without waiting for the device."""
        if self.uniform_length is not None:
            return self.uniform_length
        if isinstance(self._longest, DeferredMax):
            self._longest = self._longest.get()
        return min(self._longest + self._appended, self.slots)

    def rows(self, flat: Tensor) -> Tensor:
        """Strided view [batch, kv_heads, uniform_length, ...] of a [batch, slots, ...] tensor."""
        return self._runs(flat)[:, :, : self.uniform_length]

    def _runs(self, flat: Tensor) -> Tensor:
        """The same with the room behind: [batch, kv_heads, run, ...]."""
        runs = flat[:, : self.kv_heads * self._run]
        return runs.view(self.batch, self.kv_heads, self._run, *flat.shape[2:])

    def make_ragged(self) -> None:
        """Describe the runs by device tables from now on, wherever they are."""
        if self.uniform_length is None:
            return
        self._longest, self._appended = self.uniform_length, 0
        self._offsets.copy_(self.offsets)
        self._lengths.fill_(self.uniform_length)
        self.uniform_length = None

    def append(
        self, key: Tensor, value: Tensor, position: int | Tensor, valid: Tensor | None
    ) -> None:
        """Add one token to every run: ``store`` it and ``count`` it."""
        if valid is not None or isinstance(position, Tensor):
            self.make_ragged()
        self.store(key, value, position, valid)
        self.count()

    def count(self) -> None:
        """The host's part of ``append``: every run may be longer by one token."""
        if self.uniform_length is not None:
            self.uniform_length += 1
        else:
            self._appended += 1

    def store(
        self, key: Tensor, value: Tensor, position: int | Tensor, valid: Tensor | None
    ) -> None:
        """The device's part of ``append``; of ragged runs it reads no number of the host.

        Args:
            key: [batch, kv_heads, 1, head_dim]; value: [batch, kv_heads, 1, value_dim].
            position: the token's position: one for all sequences, or [batch] int64.
            valid: [batch, 1] bool, false where the token is padding and is not kept; None if all
                are real.
        """
        if self.uniform_length is not None:
            at = self.uniform_length
            if at >= self._run:
                raise RuntimeError(f"a run of {self._run} slots is full: compress before appending")
            self._runs(self.keys)[:, :, at] = key[:, :, 0]
            self._runs(self.values)[:, :, at] = value[:, :, 0]
            self._runs(self.positions)[:, :, at] = position
            if self.state is not None:
                self._runs(self.state)[:, :, at] = 0.0
            return
        # index_put_, since compilers do it in place where they would copy for scatter_.
        slot = (self._sequences, self._offsets + self._lengths)
        self.keys.index_put_(slot, key[:, :, 0])
        self.values.index_put_(slot, value[:, :, 0])
        self._mark(slot, position)
        self._lengths += 1 if valid is None else valid.long()

    def as_rows(self) -> Rows:
        """Everything that the slab holds, as rows that point into it."""
        index = torch.arange(self.longest, device=self.keys.device)
        index = (self.offsets[..., None] + index).clamp_max(self.slots - 1)
        return Rows(self.keys, self.values, self.positions, self.state, index, self.lengths.clone())

    def rewrite(
        self, rows: Rows, keep: Tensor, uniform_length: int | None, settle: bool = True
    ) -> None:
        """Replace the content by the kept tokens of ``rows``, tensor by tensor.

        The room that is left over is shared evenly, so that every head can grow by the same
        number of tokens: by ``interval`` when the layer is filled up to its budget.

        Args:
            rows: may point into this slab.
            keep: [batch, kv_heads, n] bool.
            uniform_length: the number of tokens kept by every head of every sequence, if the host
                knows that they are equal; None otherwise.
            settle: of no use here, see ``CodedSlab``.
        """
        lengths = keep.sum(dim=-1)
        if uniform_length is None:
            slack = (self.slots - lengths.sum(dim=1, keepdim=True)) // self.kv_heads
            room = lengths + slack
            offsets = room.cumsum(dim=1) - room
            self._longest, self._appended = DeferredMax(lengths), 0
        else:
            starts = torch.arange(self.kv_heads, device=self.keys.device) * self._run
            offsets = starts.expand(self.batch, -1)
        self._move(rows, keep, offsets)
        self._offsets.copy_(offsets)
        self._lengths.copy_(lengths)
        self.uniform_length = uniform_length

    def remove(self, gone: Tensor) -> int:
        """Drop tokens by their positions; the others keep theirs. Waits for the device.

        Args:
            gone: [batch, positions] bool, true for positions to be dropped; longer ones stay.

        Returns:
            Tokens that the fullest sequence still holds, over all heads.
        """
        rows = self.as_rows()
        keep = rows.without(gone)
        self.rewrite(rows, keep, None)
        return int(keep.sum(dim=(1, 2)).max())

    def shorten(self, tokens: int) -> int:
        """Drop the last ``tokens`` of every run; only while all runs have one length.

        Returns:
            Tokens that are left of each run.
        """
        if self.uniform_length is None or tokens > self.uniform_length:
            raise RuntimeError("runs of different lengths cannot be shortened together")
        self.uniform_length -= tokens
        return self.uniform_length

    def clear(self) -> None:
        """Drop everything; the memory stays."""
        self.uniform_length = 0
        self._longest, self._appended = 0, 0

    def content(self) -> dict[str, Tensor]:
        """All that it holds, by name; with tables of runs, whatever they are now."""
        tensors = {
            "keys": self.keys,
            "values": self.values,
            "positions": self.positions,
            "offsets": self.offsets,
            "lengths": self.lengths,
        }
        return tensors if self.state is None else {**tensors, "state": self.state}

    def fill(self, content: Mapping[str, Tensor], equal: bool, room: int) -> None:
        """Take over what another slab of the same shape held.

        Args:
            content: see ``content``.
            equal: whether all runs had one length, and lay where a slab of equal runs has them.
            room: tokens by which every run must be able to grow.

        Raises:
            ValueError: a tensor is missing, of another shape or type, or the runs do not fit.
        """
        self._check_content(content)
        own = self.content()
        offsets, lengths = content["offsets"], content["lengths"]
        ends = torch.cat([offsets[:, 1:], torch.full_like(offsets[:, :1], self.slots)], dim=1)
        fits = (offsets >= 0) & (lengths >= 0) & (offsets + lengths + room <= ends)
        if not bool(fits.all()):
            raise ValueError("the runs of the heads do not fit into the storage")
        for name in ("keys", "values", "positions"):
            own[name].copy_(content[name])
        if self.state is not None:
            self.state.copy_(content["state"])
        self._offsets.copy_(offsets)
        self._lengths.copy_(lengths)
        longest = int(lengths.max())
        self.uniform_length, self._longest, self._appended = None, longest, 0
        if equal:
            self.uniform_length = longest
            if not (
                torch.equal(self.lengths, self._lengths)
                and torch.equal(self.offsets, self._offsets)
            ):
                raise ValueError("the runs of the heads are not equal")

    def _move(self, rows: Rows, keep: Tensor, offsets: Tensor) -> None:
        """Write kept tokens into the runs that begin at ``offsets``, [batch, kv_heads] int64."""
        moved = [
            (self.keys, rows.keys),
            (self.values, rows.values),
            (self.positions, rows.positions),
        ]
        if self.state is not None and rows.state is not None:
            moved.append((self.state, rows.state))
        self._ops.move(moved, rows.index, keep, offsets)
