"""Attention with a bias of the logits by the distance between query and key, as in Inkling.

Every query brings a number for each distance from 0 to a bound; keys further away get none. It may
bring a sink of its own as well (Inkling 2), see ``reasonalloc.sinks``. The numbers follow the query
as further columns, so that whoever keeps queries keeps them too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.attention.dense import query_blocks, received_by_run, repeat_heads
from reasonalloc.attention.interface import SlabView, slot_mask
from reasonalloc.sinks import softmax


@dataclass(frozen=True)
class DistanceBias:
    """How queries with a bias by distance are read.

    Attributes:
        extent: distances that have a bias: 0 to ``extent - 1``.
        sinks: whether queries bring sinks.
    """

    extent: int
    sinks: bool = False

    def split(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return [..., head_dim], [..., extent] and the sinks [...] of wide queries."""
        width = query.shape[-1] - self.extent - self.sinks
        sinks = query[..., -1].float() if self.sinks else None
        return query[..., :width], query[..., width : width + self.extent], sinks

    def of(self, table: Tensor, distance: Tensor) -> Tensor:
        """Return the bias of logits, float32.

        Args:
            table: [..., q, extent].
            distance: [..., q, n] integers, broadcastable; position of the query minus that of the
                key.

        Returns:
            [..., q, n]; 0 where a key is further away than the table goes, or behind the query.
        """
        index = distance.clamp(0, self.extent - 1).expand(*table.shape[:-1], -1)
        near = (distance >= 0) & (distance < self.extent)
        return table.gather(-1, index.long()).float().masked_fill(~near, 0.0)

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        positions: tuple[Tensor, Tensor],
        scaling: float,
    ) -> Tensor:
        """Attention of a chunk of queries; as ``dense.attend``.

        Args:
            query: [batch, query_heads, q, width], wide.
            keys, values: [batch, kv_heads, n, ...].
            mask: bool, broadcastable to [batch, query_heads, q, n], or None: causal.
            positions: of queries [batch, q], and of keys [batch, kv_heads, n].
            scaling: of the logits.

        Returns:
            [batch, query_heads, q, value_dim].
        """
        repeated = repeat_heads(values, query.shape[1])
        blocks = self._weights(query, keys, mask, positions, scaling)
        return torch.cat([weights.to(values.dtype) @ repeated for *_, weights in blocks], dim=2)

    def received(
        self,
        query: Tensor,
        keys: Tensor,
        mask: Tensor | None,
        positions: tuple[Tensor, Tensor],
        scaling: float,
        query_valid: Tensor | None,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Attention that each key receives from each query; as ``dense.received_blocks``."""
        blocks = self._weights(query, keys, mask, positions, scaling)
        return received_by_run(blocks, keys.shape[1], query_valid)

    def decode(
        self,
        query: Tensor,
        slab: SlabView,
        position: int | Tensor,
        scaling: float,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to everything that a slab holds; as ``Backend.decode``.

        Args:
            query: [batch, query_heads, 1, width], wide.
            slab: the layer's storage, the new token included.
            position: of the query: one number, or [batch] int64.
            scaling, need_weights: see ``Backend.decode``.
        """
        batch, query_heads, _, _ = query.shape
        query, table, sinks = self.split(query.squeeze(2))
        logits = (query * scaling @ slab.keys.transpose(-1, -2)).float()  # every head, every slot
        if isinstance(position, Tensor):
            position = position[:, None]
        logits = logits + self.of(table, (position - slab.positions)[:, None])
        group = query_heads // slab.kv_heads
        own = slot_mask(slab).repeat_interleave(group, dim=1)
        weights = softmax(logits.masked_fill(~own, torch.finfo(logits.dtype).min), sinks)
        out = (weights.to(slab.values.dtype) @ slab.values).view(batch, query_heads, 1, -1)
        return out, weights.sum(dim=1) if need_weights else None

    def _weights(
        self,
        query: Tensor,
        keys: Tensor,
        mask: Tensor | None,
        positions: tuple[Tensor, Tensor],
        scaling: float,
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield blocks of queries and their weights, [batch, query_heads, stop - start, n]."""
        heads, (queries, n) = query.shape[1], (query.shape[2], keys.shape[2])
        repeated = repeat_heads(keys, heads).transpose(-1, -2)
        places = repeat_heads(positions[1], heads)[:, :, None]
        query, table, sinks = self.split(query)
        if mask is None:
            mask = torch.ones(queries, n, dtype=torch.bool, device=query.device).tril(n - queries)
            mask = mask[None, None]
        for start, stop in query_blocks(query, repeated.transpose(-1, -2)):
            block = slice(start, stop)
            logits = (query[:, :, block] * scaling @ repeated).float()
            distance = positions[0][:, None, block, None] - places
            logits = logits + self.of(table[:, :, block], distance)
            least = torch.finfo(logits.dtype).min
            logits = logits.masked_fill(~mask[:, :, block], least)
            yield start, stop, softmax(logits, None if sinks is None else sinks[:, :, block])
