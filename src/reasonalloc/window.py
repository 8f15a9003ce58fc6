"""The observation window: the queries of the last tokens of every sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonalloc.cache import Slab


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
            place = (torch.arange(first, columns) + seen) % self._window
            self._ring[:, place.to(query.device)] = fresh[:, first:]
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
        place = torch.as_tensor(seen, device=fresh.device) % self._window
        row = torch.arange(fresh.shape[0], device=fresh.device)
        at = (row, place.expand(fresh.shape[0]))
        if valid is not None:
            fresh = fresh.where(valid[..., None, None], self._ring[at][:, None])
        self._ring.index_put_(at, fresh[:, 0])

    def positions(self, seen: int | Tensor) -> Tensor:
        """[batch, window] (or [1, window]) int64, oldest first; negative where there is none."""
        steps = torch.arange(-self._window, 0, device=self._ring.device)
        return steps[None] + (seen if isinstance(seen, int) else seen[:, None])

    def read(self, seen: int | Tensor, slab: Slab) -> Tensor:
        """Queries, oldest first: [batch, kv_heads, group, window, head_dim]."""
        place = (self.positions(seen) % self._window).expand(slab.batch, -1)
        index = place[..., None, None].expand(-1, -1, *self._ring.shape[2:])
        ordered = self._ring.gather(1, index).transpose(1, 2)
        _, heads, window, head_dim = ordered.shape
        group = heads // slab.kv_heads
        return ordered.reshape(slab.batch, slab.kv_heads, group, window, head_dim)
