"""Where each head's tokens lie: the tables of a worker, for all layers at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reasonalloc.integrations.vllm.kernels import Pages
from reasonalloc.integrations.vllm.layout import Layout

NO_REQUEST = 0  # slot of requests that are none: warm-up, padding


@dataclass
class Tracked:
    """A request as a worker knows it.

    Attributes:
        slot: its row in the tables.
        start: tokens of its prefill.
        queries: its row among the remembered queries, while some are.
    """

    slot: int
    start: int
    queries: int | None = None


@dataclass
class Batch:
    """The requests of one step, in the order of their tokens.

    Attributes:
        requests: who they are.
        before, after: [requests] tokens in the cache before and after the step.
    """

    requests: list[Tracked]
    before: list[int]
    after: list[int]
    slots: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.slots = [r.slot for r in self.requests]


def dummy_batch(before: list[int], after: list[int]) -> Batch:
    """Requests of a warm-up: they live in the null block and are never compressed."""
    return Batch([Tracked(NO_REQUEST, 0) for _ in before], before, after)


class Runs:
    """Run tables. ``L`` layers, ``H`` KV heads; a run is one head's tokens, in order.

    The pages of a request are numbered through its blocks: page ``g`` is the ``g % (L * H)``-th
    (layer, head) of its block ``g // (L * H)``. The run of head ``h`` takes pages ``first``,
    ``first + stride``, ... Its token at place ``i`` has position ``i - shift``, unless it is among
    the first ``kept``, whose positions are stored.

    Args:
        layout: of this process.
        device: of the tables.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout = layout
        self.layers, self.heads = len(layout.totals), layout.kv_heads
        self._device = device
        shape = (self.layers, 0, self.heads)
        self.first = torch.zeros(shape, dtype=torch.int32, device=device)
        self.shift = torch.zeros_like(self.first)
        self.kept = torch.zeros_like(self.first)
        self.stride = torch.zeros(0, dtype=torch.int32, device=device)
        self._free: list[int] = []
        self._tracked: dict[str, Tracked] = {}
        self.version = 0  # of the tables
        self._pages: Pages | None = None
        self._page_base = torch.zeros(0, dtype=torch.int32, device=device)
        self.positions = torch.zeros(0, dtype=torch.int32, device=device)
        self._take_slot()  # the dummy's

    @property
    def per_block(self) -> int:
        """Pages of a block."""
        return self.layers * self.heads

    @property
    def pages(self) -> Pages:
        """The pool."""
        if self._pages is None:
            raise RuntimeError("the KV cache is not there yet")
        return self._pages

    @property
    def bound(self) -> bool:
        """Whether the pool is there."""
        return self._pages is not None

    def bind(self, pages: Pages) -> None:
        """Work on a pool."""
        self._pages = pages
        which = torch.arange(self.per_block, dtype=torch.int32, device=self._device)
        layer, head = which // self.heads, which % self.heads
        self._page_base = layer * (pages.blocks * self.heads) + head
        slots = len(pages.raw) * pages.block_size
        self.positions = torch.zeros(slots, dtype=torch.int32, device=self._device)

    def track(self, request: str, start: int | None) -> Tracked:
        """The request's entry; a new or reset one if ``start`` says that it begins now."""
        tracked = self._tracked.get(request)
        if start is not None:
            slot = self._take_slot() if tracked is None else tracked.slot
            self._reset(slot)
            tracked = self._tracked[request] = Tracked(slot, start)
        if tracked is None:
            raise RuntimeError(f"request {request!r} goes on, but was never begun")
        return tracked

    def forget_others(self, alive: Collection[str]) -> list[Tracked]:
        """Drop requests that are not alive; returns them."""
        gone = [request for request in self._tracked if request not in alive]
        dropped = [self._tracked.pop(request) for request in gone]
        self._free.extend(request.slot for request in dropped)
        return dropped

    def _take_slot(self) -> int:
        if not self._free:
            old = self.first.shape[1]
            new = max(8, old)
            for name in ("first", "shift", "kept"):
                table = getattr(self, name)
                more = table.new_zeros(self.layers, new, self.heads)
                setattr(self, name, torch.cat([table, more], dim=1))
            self.stride = torch.cat([self.stride, self.stride.new_zeros(new)])
            self._free = list(range(old + new - 1, old - 1, -1))
        slot = self._free.pop()
        self._reset(slot)
        return slot

    def _reset(self, slot: int) -> None:
        whole = torch.arange(self.per_block, dtype=torch.int32, device=self._device)
        self.first[:, slot] = whole.view(self.layers, self.heads)
        self.shift[:, slot] = 0
        self.kept[:, slot] = 0
        self.stride[slot] = self.per_block
        self.version += 1

    def lengths(self, slots: Tensor, tokens: Tensor) -> Tensor:
        """[L, requests, H] int32: tokens of each run when a request has seen ``tokens``."""
        return self.shift[:, slots] + tokens[:, None]

    def table(self, slots: Tensor, blocks: Tensor, pages: int) -> Tensor:
        """[L, requests, H, pages] int32: the first pages of each run.

        Args:
            slots: [requests] int64.
            blocks: [requests, n] int32, the requests' blocks.
            pages: how many; those behind a run's end are of no meaning.
        """
        steps = torch.arange(pages, dtype=torch.int32, device=self._device)
        steps = steps * self.stride[slots][:, None, None]
        number = self.first[:, slots][..., None] + steps
        return self._page(number, blocks[None, :, None].expand(self.layers, -1, self.heads, -1))

    def _page(self, number: Tensor, blocks: Tensor) -> Tensor:
        """Pool pages of request pages ``number`` [..., n] within ``blocks`` [..., blocks]."""
        block = (number // self.per_block).clamp_max(blocks.shape[-1] - 1)
        chosen = blocks.gather(-1, block.long())
        return chosen * self.heads + self._page_base[number % self.per_block]

    def place(self, first: Tensor, stride: Tensor | int, index: Tensor, blocks: Tensor) -> Tensor:
        """Pool slots (page * block_size + place) of the tokens at ``index`` of runs.

        Args:
            first, index: broadcastable, [requests, ..., n]; stride likewise.
            blocks: [requests, blocks] int32.
        """
        size = self.layout.reserve.block_size
        number = first + index // size * stride
        between = [1] * (number.dim() - 2)
        wide = blocks.view(len(blocks), *between, -1).expand(*number.shape[:-1], -1)
        return self._page(number, wide).long() * size + index % size


class QueryRows:
    """Queries of the tokens before a boundary, for requests that are about to reach one.

    Row ``r`` keeps the query of position ``p`` in place ``p % window``. Rows are lent and given
    back, since few requests are that near to a boundary at a time.
    """

    def __init__(self, layers: int, window: int) -> None:
        self._layers, self.window = layers, window
        self._rows: list[Tensor] = []
        self._free: list[int] = []
        self._made = 0

    def lend(self, request: Tracked) -> int:
        """A row for a request."""
        if request.queries is None:
            if not self._free:
                self._free = [self._made]
                self._made += 1
            request.queries = self._free.pop()
        return request.queries

    def give_back(self, requests: Sequence[Tracked]) -> None:
        """The requests need none any more."""
        for request in requests:
            if request.queries is not None:
                self._free.append(request.queries)
                request.queries = None

    def note(self, layer: int, query: Tensor, tokens: Tensor, rows: Tensor, places: Tensor) -> None:
        """Remember ``query[tokens]``; query is [n, query_heads, head_dim]."""
        while len(self._rows) < self._layers:
            self._rows.append(query.new_zeros(0, self.window, *query.shape[1:]))
        kept = self._rows[layer]
        if len(kept) < self._made:
            more = kept.new_zeros(max(self._made, 2 * len(kept)) - len(kept), *kept.shape[1:])
            kept = self._rows[layer] = torch.cat([kept, more])
        kept[rows, places] = query[tokens]

    def read(self, layer: int, rows: Tensor, positions: Tensor, kv_heads: int) -> Tensor:
        """[rows, kv_heads, group, window, head_dim]; positions [rows, window], oldest first."""
        queries = self._rows[layer][rows[:, None], positions % self.window]
        return queries.transpose(1, 2).unflatten(1, (kv_heads, -1))
