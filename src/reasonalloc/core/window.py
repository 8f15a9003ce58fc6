"""The observation window: the queries of the last tokens of every sequence."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from reasonalloc.cache import AnySlab


class QueryWindow:
    """Ring of the last ``window`` queries; that of position ``p`` lies in place ``p % window``.

    Args:
        query: [batch, query_heads, q, head_dim], for shape, dtype and device.
        window: number of queries kept.
    """

    def __init__(self, query: Tensor, window: int) -> None:
        batch, heads, _, head_dim = query.shape
        self._window = window
        self._ring = query.new_zeros(batch, window, heads, head_dim)
        self._first: Tensor | None = None  # [batch] int64: queries before this are lost

    @property
    def ring(self) -> Tensor:
        """[batch, window, query_heads, head_dim]; where it lies until several tokens are pushed."""
        return self._ring

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self._ring.nbytes

    def push(self, query: Tensor, seen: int | Tensor, valid: Tensor | None) -> None:
        """Take note of new queries.

        Args:
            query: [batch, query_heads, q, head_dim].
            seen: tokens of each sequence before these: one number or [batch] int64.
            valid: [batch, q] bool, false at padding; None if all are real.
        """
        columns = query.shape[2]
        fresh = query.transpose(1, 2).to(self._ring.dtype)  # under autocast types change
        if columns == 1:
            self._push_one(fresh, seen, valid)
            return
        if isinstance(seen, int) and valid is None:
            first = max(0, columns - self._window)
            place = (torch.arange(first, columns, device=query.device) + seen) % self._window
            self._ring[:, place] = fresh[:, first:]
            return
        batch = query.shape[0]
        real = torch.ones(batch, columns, dtype=torch.bool, device=query.device)
        real = real if valid is None else valid
        start = seen if isinstance(seen, int) else seen[:, None]
        positions = start + real.long().cumsum(dim=1) - 1
        newest = start + real.long().sum(dim=1, keepdim=True)
        wanted = real & (positions >= newest - self._window)
        place = (positions % self._window).masked_fill(~wanted, self._window)
        spare = torch.cat([self._ring, self._ring[:, :1]], dim=1)
        index = place[..., None, None].expand(-1, -1, *fresh.shape[2:])
        self._ring = spare.scatter(1, index, fresh)[:, : self._window].contiguous()

    def _push_one(self, fresh: Tensor, seen: int | Tensor, valid: Tensor | None) -> None:
        """In place, so that a captured step finds the ring where it was. [batch, 1, heads, dim]."""
        if isinstance(seen, int) and valid is None:
            self._ring[:, seen % self._window] = fresh[:, 0]
            return
        place = torch.as_tensor(seen, dtype=torch.int64, device=fresh.device) % self._window
        row = torch.arange(fresh.shape[0], device=fresh.device)
        at = (row, place.expand(fresh.shape[0]))
        if valid is not None:
            fresh = fresh.where(valid[..., None, None], self._ring[at][:, None])
        self._ring.index_put_(at, fresh[:, 0])

    def go_back(self, before: int | Tensor, seen: int | Tensor) -> None:
        """Forget the queries of tokens that were dropped from the end.

        Those that they had overwritten are lost: ``read`` gives zeros, ``positions`` -1.

        Args:
            before, seen: tokens of each sequence before and after: one number or [batch] int64.
        """
        batch, device = self._ring.shape[0], self._ring.device
        old, new = (
            torch.as_tensor(x, dtype=torch.int64, device=device).expand(batch)
            for x in (before, seen)
        )
        held = torch.arange(-self._window, 0, device=device) + old[:, None]
        dropped = (held >= new[:, None]).scatter(1, held % self._window, held >= new[:, None])
        self._ring.masked_fill_(dropped[..., None, None], 0.0)
        first = old - self._window
        first = first if self._first is None else torch.maximum(self._first, first)
        self._first = torch.minimum(first, new)

    def clear(self) -> None:
        """Forget everything; the memory stays."""
        self._ring.zero_()
        self._first = None

    def copy(self, sequences: Tensor | None = None) -> QueryWindow:
        """The same queries in memory of its own; see ``Slab.copy``."""
        twin = copy.copy(self)
        twin._ring = self._ring.clone() if sequences is None else self._ring[sequences]
        if self._first is not None and sequences is not None:
            twin._first = self._first[sequences]
        return twin

    def content(self) -> dict[str, Tensor]:
        """All that it holds, by name."""
        first = {} if self._first is None else {"first_query": self._first}
        return {"queries": self._ring, **first}

    def fill(self, content: Mapping[str, Tensor]) -> None:
        """Take over what another window of the same shape held; see ``content``.

        Raises:
            ValueError: a tensor is missing, or of another shape or type.
        """
        ring, first = content.get("queries"), content.get("first_query")
        if ring is None or ring.shape != self._ring.shape or ring.dtype != self._ring.dtype:
            raise ValueError("the queries of the window do not fit")
        if first is not None and (first.shape != ring.shape[:1] or first.dtype != torch.int64):
            raise ValueError("first_query does not fit")
        self._ring.copy_(ring)
        self._first = None if first is None else first.clone()

    def positions(self, seen: int | Tensor) -> Tensor:
        """[batch, window] (or [1, window]) int64, oldest first; negative where there is none."""
        steps = torch.arange(-self._window, 0, device=self._ring.device)
        places = steps[None] + (seen if isinstance(seen, int) else seen[:, None])
        if self._first is None:
            return places
        return places.masked_fill(places < self._first[:, None], -1)

    def _places(self, seen: int | Tensor) -> Tensor:
        steps = torch.arange(-self._window, 0, device=self._ring.device)
        return (steps[None] + (seen if isinstance(seen, int) else seen[:, None])) % self._window

    def read(self, seen: int | Tensor, slab: AnySlab) -> Tensor:
        """Queries, oldest first: [batch, kv_heads, group, window, head_dim]."""
        place = self._places(seen).expand(slab.batch, -1)
        index = place[..., None, None].expand(-1, -1, *self._ring.shape[2:])
        ordered = self._ring.gather(1, index).transpose(1, 2)
        _, heads, window, head_dim = ordered.shape
        group = heads // slab.kv_heads
        return ordered.reshape(slab.batch, slab.kv_heads, group, window, head_dim)
