"""What happens at a boundary: score, allocate, select, and move what stays among the pages.

All layers of all requests that are due are one batch: a *row* is one layer of one request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.cache.host import DeferredMax
from reasonalloc.core.boundary import decide
from reasonalloc.core.pinned import Pinned
from reasonalloc.integrations.vllm.budget import EngineBudget
from reasonalloc.integrations.vllm.moves import Kept, Rows, move
from reasonalloc.integrations.vllm.runs import QueryRows, Runs, Tracked, send
from reasonalloc.integrations.vllm.views import CodedPool, view_runs
from reasonalloc.ops import choose_operations
from reasonalloc.ops.native.paged import Layout
from reasonalloc.policies import Candidates
from reasonalloc.registry import is_builtin

_KEPT_BYTES = 256 << 20  # of kept keys and values that are held outside the pool at a time
_DECIDED_BYTES = 1 << 30  # of what a decision works with at a time
_CPU_DECIDED_BYTES = 8 << 20  # the same on a CPU, where what leaves its caches is slow
_COPIES = 6  # that a policy makes of the keys, in float32, generously


@dataclass(frozen=True)
class Due:
    """A request at a boundary: ``row`` of the batch, ``tokens`` in the cache."""

    request: Tracked
    row: int
    tokens: int


@dataclass(frozen=True)
class _Row:
    """One layer of one request, on the host.

    Attributes:
        full: it is over its budget.
        total: tokens that may stay besides pinned ones, all heads together.
        moved: tokens that stay and change their place.
        room: tokens that each head will grow by.

    Where older tokens are coded both follow from what each head keeps, and are 0 here.
    """

    due: Due
    layer: int
    full: bool
    total: int
    moved: int
    room: int


class PoolCompressor:
    """Compresses requests in vLLM's pool, by the same decisions as on transformers.

    Args:
        plan: budgets, policy.
        rank: tensor-parallel rank of this process.
        runs, queries: where tokens lie, the last queries.
        scaling, softcap: of the attention logits.
        sinks: [L, H, group] float32 learned sinks, see ``reasonalloc.sinks``, or None.
        stage: pipeline-parallel stage of this process; the layers of ``runs`` are its own.
        layout: of the pool, where our own loops on processors read it, or None: then they decide
            and move tokens as well.
        coded: pages of coded tokens, or None.
    """

    def __init__(
        self,
        plan: EngineBudget,
        rank: int,
        runs: Runs,
        queries: QueryRows,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None = None,
        stage: int = 0,
        layout: Layout | None = None,
        coded: CodedPool | None = None,
    ) -> None:
        self._coded = coded
        self._layout, self._ops = layout, choose_operations(layout is not None)
        self._plan, self._runs, self._queries = plan, runs, queries
        self._heads = HEAD_ALLOCATORS.create(plan.config.arm.heads)
        self._scaling, self._softcap, self._sinks = scaling, softcap, sinks
        shard, device = plan.shard(rank), runs.device
        self._policy = plan.policy_of(shard)
        self._before = plan.stage(stage).start or 0  # layers of the stages before
        self._planned: Tensor | None = None
        if plan.planned is not None:
            own = [list(shard.heads(heads)) for heads in plan.planned[plan.stage(stage)]]
            self._planned = torch.tensor(own, dtype=torch.int64, device=device)
        # What is not ours may take the index of a layer for a number.
        self._together = is_builtin(type(self._policy)) and is_builtin(type(self._heads))

    def run(self, due: Sequence[Due], blocks: Tensor) -> None:
        """Compress requests that have just reached a boundary.

        Args:
            due: they.
            blocks: [batch, n] int32, blocks of all requests of the batch.
        """
        for chunk in self._chunks(due):
            self._compress(chunk, blocks)
        config = self._plan.config
        if config.window <= config.interval:  # else the next window holds queries of this one
            self._queries.give_back([item.request for item in due])

    def _chunks(self, due: Sequence[Due]) -> Iterator[list[_Row]]:
        """The rows of as many requests as may be held outside the pool at a time."""
        pages = self._runs.pages
        one = pages.raw[0, :, 0].numel() * pages.raw.element_size()
        chunk, requests = list[_Row](), 0
        # Rows are as long as the longest, so that short requests are not put with long ones.
        for item in sorted(due, key=self._moving):
            rows = self._rows(item)
            if chunk and (requests + 1) * self._moving(item) * one > _KEPT_BYTES:
                yield chunk
                chunk, requests = [], 0
            chunk, requests = chunk + rows, requests + bool(rows)
        if chunk:
            yield chunk

    def _moving(self, item: Due) -> int:
        """Most tokens of a request, all runs together, that change their place."""
        layout = self._runs.layout
        # Pinned tokens that are not coded stay where they are.
        pinned = 0 if layout.coding is None else layout.reserve.pinned(item.request.start)
        return sum(layout.totals) + self._runs.per_block * pinned

    def _rows(self, item: Due) -> list[_Row]:
        """The layers of a request that are compressed, or change their place for the first time."""
        layout, tokens, start = self._runs.layout, item.tokens, item.request.start
        reserve, heads = layout.reserve, self._runs.heads
        event = reserve.first_event(start)
        stays = reserve.leading(start) * reserve.block_size
        rows = []
        for layer, total in enumerate(layout.totals):
            # A layer with a large budget may still be filling up.
            full = layout.is_due(layer, start, tokens)
            if layout.coding is not None:
                if tokens >= event:  # at every boundary, since plain tokens are coded
                    rows.append(_Row(item, layer, full, total, 0, 0))
            elif tokens >= event and full:
                moved = total + heads * (reserve.pinned(start) - stays)
                rows.append(_Row(item, layer, True, total, moved, reserve.interval))
            elif tokens == event:
                room = layout.first_due(layer, start) - tokens
                moved = heads * (tokens - stays)
                rows.append(_Row(item, layer, False, heads * tokens, moved, room))
        return rows

    def _compress(self, chunk: Sequence[_Row], blocks: Tensor) -> None:
        """All layers change places among each other: everything is read before any write."""
        chunk = sorted(chunk, key=lambda row: not row.full)  # those that are decided on come first
        rows = self._gather(chunk, blocks)
        keep, budgets = self._decide(rows, chunk)
        most_moved = max(row.moved for row in chunk)
        again = all(row.due.request.longest is not None for row in chunk)
        kept = Kept(keep, budgets, most_moved, again)
        move(rows, kept, self._layout)
        longest, layout = DeferredMax(budgets), self._runs.layout
        for item in {row.due.request.slot: row.due for row in chunk}.values():
            start = item.request.start
            every = (layout.is_due(n, start, item.tokens) for n in range(self._runs.layers))
            if layout.coding is not None or all(every):
                item.request.longest, item.request.compressed = longest, item.tokens

    def _gather(self, chunk: Sequence[_Row], blocks: Tensor) -> Rows:
        runs = self._runs
        dues = [row.due for row in chunk]
        reserve = runs.layout.reserve
        leading = {due.request.slot: reserve.leading(due.request.start) for due in dues}
        offsets = {due.request.slot: runs.layout.offsets(due.request.start) for due in dues}
        batch, layers, slots, tokens, *others = send(
            runs.device,
            [due.row for due in dues],
            [row.layer for row in chunk],
            [due.request.slot for due in dues],
            [due.tokens for due in dues],
            [due.request.start for due in dues],
            [row.total for row in chunk],
            [row.moved for row in chunk],
            [row.room for row in chunk],
            [leading[due.request.slot] for due in dues],
            [
                leading[due.request.slot] if due.request.before is None else due.request.before
                for due in dues
            ],
            [due.request.queries or 0 for due in dues],
            [offsets[row.due.request.slot][row.layer] for row in chunk],
        )
        requests = {due.request.slot: due for due in dues}.values()
        longest = max(due.request.most(due.tokens) for due in requests)
        moved = any(due.request.longest is not None for due in requests)
        own, tables = blocks[batch], (layers, slots, tokens)
        numbered, start = [row.layer for row in chunk], max(due.request.start for due in dues)
        view = view_runs(runs, self._coded, numbered, tables, own, longest, start, moved)
        starts, totals, kept, rooms, stays, before, queries, first = others
        return Rows(
            layers,
            slots,
            tokens,
            starts,
            totals,
            kept,
            rooms,
            stays,
            before,
            queries,
            first,
            own,
            view,
        )

    def _decide(self, rows: Rows, chunk: Sequence[_Row]) -> tuple[Tensor, Tensor]:
        """What stays of each row, [n, H, tokens] bool, and how many, [n, H] int64."""
        full, parts = sum(row.full for row in chunk), list[tuple[Tensor, Tensor]]()
        for part in self._parts(chunk[:full], rows):
            some = rows.part(part)
            layer = some.layers if self._together else chunk[part.start].layer
            total: int | Tensor = some.totals if self._together else chunk[part.start].total
            planned = None if self._planned is None else self._planned[layer]
            parts.append(
                decide(
                    self._candidates(some, layer),
                    self._plan.config,
                    self._policy,
                    self._heads,
                    total,
                    planned,
                    ops=self._ops,
                    pinned=self._pinned(some, chunk[part]),
                    capped=self._plan.formats is not None,
                )
            )
        if full < len(chunk):  # the others keep everything
            lengths = rows.view.lengths[full:]
            index = torch.arange(rows.view.positions.shape[-1], device=lengths.device)
            parts.append((index < lengths[..., None], lengths.long()))
        keep, budgets = (torch.cat(each) for each in zip(*parts, strict=True))
        return keep, budgets

    def _pinned(self, rows: Rows, chunk: Sequence[_Row]) -> Pinned | None:
        """The prompts of rows, if these stay."""
        if not self._runs.layout.reserve.pin:
            return None
        starts, pinned = {row.due.request.start for row in chunk}, Pinned()
        pinned.add(0, max(starts) if len(starts) == 1 else rows.starts, max(starts))
        return pinned

    def _parts(self, chunk: Sequence[_Row], rows: Rows) -> Iterator[slice]:
        """Rows that are decided on at a time: as memory allows, or one by one."""
        n = rows.view.positions.shape[-1]
        one = self._runs.heads * n * self._runs.pages.keys.shape[-1] * 4 * _COPIES
        most = _CPU_DECIDED_BYTES if self._runs.device.type == "cpu" else _DECIDED_BYTES
        size = max(1, most // one) if self._together else 1
        for start in range(0, len(chunk), size):
            yield slice(start, min(start + size, len(chunk)))

    def _candidates(self, rows: Rows, layer: int | Tensor) -> Candidates:
        policy, window, runs = self._policy, self._plan.config.window, self._runs
        recent = rows.tokens[:, None] + torch.arange(-window, 0, device=runs.device)
        queries = None
        if policy.needs_queries:
            queries = self._queries.read(rows.layers, rows.queries, recent, runs.heads)
        sinks = query_sinks = None
        if self._sinks is not None:
            own = self._sinks[layer]
            if isinstance(layer, int):
                sinks = own
            else:  # one for each query, since rows are of several layers
                query_sinks = own[..., None].expand(-1, -1, -1, window)
        stored, view = None, rows.view
        if self._layout is not None and policy.loop is not None and query_sinks is None:
            keys = view.numbers(0).flatten(1, 2)
            index = torch.arange(keys.shape[1], device=keys.device).view(1, runs.heads, -1)
            stored = keys, index.expand(len(keys), -1, -1)
        return Candidates(
            lengths=view.lengths.long(),
            positions=view.positions.long(),
            load_keys=lambda: view.numbers(0),
            load_values=lambda: view.numbers(1),
            queries=queries,
            query_positions=recent if policy.needs_queries else None,
            state=view.state(),
            seen=rows.tokens,
            window=window,
            scaling=self._scaling,
            softcap=self._softcap,
            layer=layer + self._before if self._before else layer,
            seed=self._plan.config.seed,
            sinks=sinks,
            query_sinks=query_sinks,
            stored=stored,
        )
