"""What happens at a boundary: score, allocate, select, and move what stays among the pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.core.boundary import decide
from reasonalloc.integrations.vllm.budget import EngineBudget
from reasonalloc.integrations.vllm.runs import QueryRows, Runs, Tracked
from reasonalloc.policies import Candidates

_CHUNK_BYTES = 256 << 20  # of kept keys and values that are held outside the pool at a time


@dataclass(frozen=True)
class Due:
    """A request at a boundary: ``row`` of the batch, ``tokens`` in the cache."""

    request: Tracked
    row: int
    tokens: int


@dataclass(frozen=True)
class _Group:
    """Requests that are treated alike, as tensors."""

    slots: Tensor  # [n] int64
    tokens: Tensor  # [n] int32
    blocks: Tensor  # [n, blocks] int32
    queries: Tensor  # [n] int64, rows of QueryRows


@dataclass(frozen=True)
class _Moved:
    """What stays of one layer: where it goes, and what the tables will say."""

    layer: int
    to: Tensor  # [n, kept] int64, pool slots
    keys: Tensor
    values: Tensor
    positions: Tensor  # [n, kept] int32
    first: Tensor  # [n, kv_heads] int32, and the next two
    shift: Tensor
    kept: Tensor


class PoolCompressor:
    """Compresses requests in vLLM's pool, by the same decisions as on transformers.

    Args:
        plan: budgets, policy.
        rank: tensor-parallel rank of this process.
        runs, queries: where tokens lie, the last queries.
        scaling, softcap: of the attention logits.
    """

    def __init__(
        self,
        plan: EngineBudget,
        rank: int,
        runs: Runs,
        queries: QueryRows,
        scaling: float,
        softcap: float | None,
    ) -> None:
        self._plan, self._runs, self._queries = plan, runs, queries
        self._heads = HEAD_ALLOCATORS.create(plan.config.arm.heads)
        self._scaling, self._softcap = scaling, softcap
        shard = plan.shard(rank)
        device = runs.first.device
        self._planned = [
            None
            if heads is None
            else torch.tensor(shard.heads(heads), dtype=torch.int64, device=device)
            for heads in (plan.planned or [None] * runs.layers)
        ]
        self._offsets = runs.layout.offsets

    def run(self, due: Sequence[Due], blocks: Tensor) -> None:
        """Compress requests that have just reached a boundary.

        Args:
            due: they.
            blocks: [batch, n] int32, blocks of all requests of the batch.
        """
        reserve = self._runs.layout.reserve
        later: list[Due] = []
        first: dict[tuple[int, int], list[Due]] = {}
        for item in due:
            event = reserve.first_event(item.request.start)
            if item.tokens > event:
                later.append(item)
            elif item.tokens == event:
                first.setdefault((item.tokens, item.request.start), []).append(item)
        for chunk in self._chunks(later):
            everybody = self._group(chunk, blocks)
            for layer in range(self._runs.layers):
                # A layer with a large budget may still be filling up.
                full = [i for i in chunk if self._runs.layout.is_due(layer, i.tokens)]
                if full:
                    group = everybody if len(full) == len(chunk) else self._group(full, blocks)
                    self._write(group, self._keep(layer, group, None))
        for (_, start), same in first.items():
            for chunk in self._chunks(same):
                group = self._group(chunk, blocks)
                # All layers change places among each other: read everything before any write.
                moved = [self._keep(layer, group, start) for layer in range(self._runs.layers)]
                for part in moved:
                    self._write(group, part)
                self._runs.stride[group.slots] = 1
        self._queries.give_back([item.request for item in due])
        self._runs.version += 1

    def _chunks(self, items: list[Due]) -> list[list[Due]]:
        pages = self._runs.pages
        one = sum(self._runs.layout.totals) * pages.raw[0, :, 0].numel() * pages.raw.element_size()
        size = max(1, _CHUNK_BYTES // one)
        return [items[i : i + size] for i in range(0, len(items), size)]

    def _group(self, items: Sequence[Due], blocks: Tensor) -> _Group:
        device = blocks.device
        rows = torch.tensor([item.row for item in items], dtype=torch.int64, device=device)
        return _Group(
            slots=torch.tensor(
                [item.request.slot for item in items], dtype=torch.int64, device=device
            ),
            tokens=torch.tensor([i.tokens for i in items], dtype=torch.int32, device=device),
            blocks=blocks[rows],
            queries=torch.tensor(
                [item.request.queries or 0 for item in items], dtype=torch.int64, device=device
            ),
        )

    def _keep(self, layer: int, group: _Group, start: int | None) -> _Moved:
        """Decide what stays of a layer.

        Args:
            layer: which.
            group: requests; of the same length and ``start`` if that is given.
            start: tokens of the prefill if this is the first compression: then the layer may
                still be below its budget and only change its place.
        """
        runs, layout = self._runs, self._runs.layout
        shift, kept = runs.shift[layer, group.slots], runs.kept[layer, group.slots]
        lengths = shift + group.tokens[:, None]
        index = torch.arange(int(lengths.max()), dtype=torch.int32, device=shift.device)
        source = runs.place(
            runs.first[layer, group.slots][..., None],
            runs.stride[group.slots][:, None, None],
            index,
            group.blocks,
        )
        positions = (index - shift[..., None]).where(
            index >= kept[..., None], runs.positions[source]
        )
        room, total = layout.reserve.interval, layout.totals[layer]
        tokens = int(group.tokens[0]) if start is not None else 0
        if start is not None and not layout.is_due(layer, tokens):
            keep, budgets = index < lengths[..., None], lengths.long()
            room, total = layout.first_due(layer, start) - tokens, runs.heads * tokens
        else:
            keep, budgets = decide(
                self._candidates(layer, group, lengths, positions, source),
                self._plan.config,
                self._plan.policy,
                self._heads,
                total,
                self._planned[layer],
            )
        size = layout.reserve.block_size
        pages = (budgets + room + size - 1) // size
        first = (self._offsets[layer] + pages.cumsum(dim=1) - pages).int()
        # What stays, one head after the other: as many tokens for every request.
        chosen = keep.flatten(1).to(torch.int8).argsort(dim=1, descending=True, stable=True)
        chosen = chosen[:, :total]
        rank = (keep.cumsum(dim=-1) - 1).flatten(1).gather(1, chosen)
        to = runs.place(first.gather(1, chosen // len(index)), 1, rank, group.blocks)
        keys, values = runs.pages.read(source.flatten(1).gather(1, chosen))
        return _Moved(
            layer,
            to,
            keys,
            values,
            positions.flatten(1).gather(1, chosen),
            first,
            (budgets - group.tokens[:, None]).int(),
            budgets.int(),
        )

    def _candidates(
        self, layer: int, group: _Group, lengths: Tensor, positions: Tensor, source: Tensor
    ) -> Candidates:
        policy, window = self._plan.policy, self._plan.config.window
        seen = group.tokens.long()
        recent = seen[:, None] + torch.arange(-window, 0, device=seen.device)
        queries = None
        if policy.needs_queries:
            queries = self._queries.read(layer, group.queries, recent, self._runs.heads)
        return Candidates(
            lengths=lengths.long(),
            positions=positions.long(),
            load_keys=lambda: self._runs.pages.read(source)[0],
            load_values=lambda: self._runs.pages.read(source)[1],
            queries=queries,
            query_positions=recent if policy.needs_queries else None,
            state=None,
            seen=seen,
            window=window,
            scaling=self._scaling,
            softcap=self._softcap,
            layer=layer,
            seed=self._plan.config.seed,
        )

    def _write(self, group: _Group, moved: _Moved) -> None:
        runs, layer = self._runs, moved.layer
        runs.pages.write(moved.to, moved.keys, moved.values)
        runs.positions[moved.to] = moved.positions
        runs.first[layer, group.slots] = moved.first
        runs.shift[layer, group.slots] = moved.shift
        runs.kept[layer, group.slots] = moved.kept
