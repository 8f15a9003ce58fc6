"""Where each head's tokens lie: the tables of a worker, for all layers at once."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from reasonalloc.cache.host import DeferredMax
from reasonalloc.integrations.vllm.layout import Layout
from reasonalloc.integrations.vllm.pages import Pages

NO_REQUEST = 0  # slot of requests that are none: warm-up, padding
_ALL = 1 << 30  # leading pages of a request that was never compressed


@dataclass
class Tracked:
    """A request as a worker knows it.

    Attributes:
        slot: its row in the tables.
        start: tokens of its prefill.
        seen: tokens in the cache after the last step that was scheduled.
        observed: tokens whose attention the policy has seen, if it looks at any.
        queries: its row among the remembered queries, while some are.
        longest: tokens of its longest run right after ``compressed`` tokens; None while some layer
            holds all of them.
        before: blocks of its row before those of its compressed runs; None: those that stay.
    """

    slot: int
    start: int
    seen: int = 0
    observed: int = 0
    queries: int | None = None
    longest: DeferredMax | None = None
    compressed: int = 0
    before: int | None = None

    def most(self, tokens: int) -> int:
        """Upper bound of the tokens in a run when the request has ``tokens``."""
        if self.longest is None:
            return tokens
        return self.longest.get() + tokens - self.compressed


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


def send(device: torch.device, *rows: Sequence[int]) -> list[Tensor]:
    """Whole numbers of the host as int64 tensors on a device, in one copy that nobody waits for."""
    flat = [number for row in rows for number in row]
    # Pinned memory of PyTorch's allocator is not given to others before the copy is done.
    pinned = device.type == "cuda"
    packed = torch.tensor(flat, dtype=torch.int64, device="cpu", pin_memory=pinned)
    return list(packed.to(device, non_blocking=True).split([len(row) for row in rows]))


class Runs:
    """Run tables. ``L`` layers, ``H`` KV heads; a run is one head's tokens, in order.

    The pages of a request are numbered through its blocks: page ``g`` is the ``g % (L * H)``-th
    (layer, head) of its block ``g // (L * H)``. The first ``plain`` pages of the run of (layer,
    head) lie as vLLM has them: page ``i`` is the (layer, head) of block ``i``. Those behind them
    follow each other from page ``first`` on, counted behind the plain blocks; blocks that were
    given back count too. The run's token at place ``i`` has position ``i - shift``, unless it is
    among the first ``kept``: then its position is stored, or is ``i`` where the page is plain.

    Where older tokens are kept in fewer bits (``coding.py``) a run begins with ``coded`` tokens in
    as many pages as they take, and its plain ones follow from place ``begin`` on, the first of the
    next page. Places count what pages could hold of plain tokens: they are not the tokens' ranks.

    Args:
        layout: of this process.
        device: of the tables.
        requests: how many there are at most at a time.
        channels: numbers that the policy keeps of every token.
    """

    def __init__(
        self, layout: Layout, device: torch.device, requests: int, channels: int = 0
    ) -> None:
        self.layout = layout
        self.layers, self.heads = len(layout.totals), layout.kv_heads
        self.device, self._channels = device, channels
        shape = (self.layers, requests + 1, self.heads)
        self.first = torch.zeros(shape, dtype=torch.int32, device=device)
        self.shift = torch.zeros_like(self.first)
        self.kept = torch.zeros_like(self.first)
        self.coded = torch.zeros_like(self.first)
        self.begin = torch.zeros_like(self.first)
        self.plain = torch.full((requests + 1,), _ALL, dtype=torch.int32, device=device)
        self._free = list(range(1, requests + 1))  # the first is the dummy's
        self._tracked: dict[str, Tracked] = {}
        self.version = 0  # of the tables
        self._pages: Pages | None = None
        self._page_base = torch.zeros(0, dtype=torch.int32, device=device)
        self.positions = torch.zeros(0, dtype=torch.int32, device=device)
        self.state: Tensor | None = None

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
    def states(self) -> Tensor | None:
        """``state`` by pages, [pages, block_size, channels] float32; None without."""
        if self.state is None:
            return None
        return self.state.view(-1, self.layout.reserve.block_size, self._channels)

    @property
    def bound(self) -> bool:
        """Whether the pool is there."""
        return self._pages is not None

    def bind(self, pages: Pages) -> None:
        """Work on a pool."""
        self._pages = pages
        which = torch.arange(self.per_block, dtype=torch.int32, device=self.device)
        layer, head = which // self.heads, which % self.heads
        self._page_base = layer * pages.of_layer + head * pages.of_head
        slots = len(pages.raw) * pages.block_size
        self.positions = torch.zeros(slots, dtype=torch.int32, device=self.device)
        if self._channels:
            shape = (slots, self._channels)
            self.state = torch.zeros(shape, dtype=torch.float32, device=self.device)

    def track(self, request: str, start: int, before: int) -> Tracked:
        """The request's entry; a new one if it is not known, or begins anew.

        Args:
            request: its name.
            start: tokens of its prefill.
            before: tokens in the cache before the step; fewer than were seen: it begins anew.
        """
        tracked = self._tracked.get(request)
        if tracked is None or before < tracked.seen:
            slot = self._take_slot() if tracked is None else tracked.slot
            self._reset(slot)
            queries = None if tracked is None else tracked.queries
            tracked = self._tracked[request] = Tracked(slot, start, before, before, queries)
        return tracked

    def forget_others(self, alive: Collection[str]) -> list[Tracked]:
        """Drop requests that are not alive; returns them."""
        return self.forget([request for request in self._tracked if request not in alive])

    def forget(self, requests: Collection[str]) -> list[Tracked]:
        """Drop requests, as far as they are known; returns them."""
        dropped = [self._tracked.pop(name) for name in requests if name in self._tracked]
        for request in dropped:
            heapq.heappush(self._free, request.slot)
        return dropped

    def _take_slot(self) -> int:
        if not self._free:
            raise RuntimeError(f"more than {self.plain.shape[0] - 1} requests at a time")
        return heapq.heappop(self._free)

    def _reset(self, slot: int) -> None:
        for table in (self.first, self.shift, self.kept, self.coded, self.begin):
            table[:, slot] = 0
        self.plain[slot].fill_(_ALL)  # waits for nothing, as an assignment would
        self.version += 1

    def lengths(self, slots: Tensor, tokens: Tensor) -> Tensor:
        """[L, requests, H] int32: where each run ends when a request has seen ``tokens``.

        That is the number of its tokens, unless it begins with coded ones.
        """
        return self.shift[:, slots] + tokens[:, None]

    def table(self, slots: Tensor, blocks: Tensor, pages: int) -> Tensor:
        """[L, requests, H, pages] int32: the first pages of each run.

        Args:
            slots: [requests] int64.
            blocks: [requests, n] int32, the requests' blocks.
            pages: how many; those behind a run's end are of no meaning.
        """
        layers = torch.arange(self.layers, device=self.device)[:, None]
        return self.numbered(
            self.first[:, slots],
            self.plain[slots],
            layers,
            blocks.expand(self.layers, -1, -1),
            pages,
        )

    def numbered(
        self, first: Tensor, plain: Tensor, layers: Tensor, blocks: Tensor, pages: int
    ) -> Tensor:
        """[..., H, pages] int32: the first pages of runs, in the pool.

        Args:
            first: [..., H] int32, see the class.
            plain: [...] int32, likewise.
            layers: [...] int64, of each row.
            blocks: [..., n] int32, the requests' blocks.
            pages: how many; those behind a run's end are of no meaning.
        """
        index = torch.arange(pages, dtype=torch.int32, device=self.device)
        head = torch.arange(self.heads, dtype=torch.int32, device=self.device)[:, None]
        own = layers.int()[..., None, None] * self.heads + head
        number = self._number(own, first[..., None], plain[..., None, None], index)
        block = (number // self.per_block).clamp_max(blocks.shape[-1] - 1)
        wide = blocks[..., None, :].expand(*block.shape[:-1], -1)
        return self._in_pool(number, wide.gather(-1, block.long()))

    def _number(self, own: Tensor, first: Tensor, plain: Tensor, index: Tensor) -> Tensor:
        """Number of page ``index`` of runs among their requests' pages; all broadcast.

        ``own`` is the number of (layer, head) in a block; ``first`` and ``plain`` are the tables'.
        """
        leading = plain.minimum(index)  # of a request that was never compressed plain is huge
        behind = leading * self.per_block + first + (index - leading)
        return torch.where(index < plain, own + index * self.per_block, behind)

    def _in_pool(self, number: Tensor, block: Tensor) -> Tensor:
        """Pool pages of request pages ``number``, which lie in the pool's blocks ``block``."""
        return block * self.pages.of_block + self._page_base[number % self.per_block]

    def places(self, slots: Tensor, positions: Tensor, blocks: Tensor, rows: Tensor) -> Tensor:
        """[L, tokens, H] int64: where tokens lie (page * block_size + place), of every run.

        Args:
            slots, rows: [tokens] int64, of each token's request in the tables and in ``blocks``.
            positions: [tokens] int32, those that a run keeps where they came.
            blocks: [requests, n] int32, the requests' blocks.
        """
        size = self.layout.reserve.block_size
        place = (self.shift[:, slots] + positions[:, None]).clamp_min(0)
        page = place // size
        own = torch.arange(self.per_block, dtype=torch.int32, device=self.device)
        own = own.view(self.layers, 1, self.heads)
        number = self._number(own, self.first[:, slots], self.plain[slots][:, None], page)
        block = (number // self.per_block).clamp_max(blocks.shape[-1] - 1)
        chosen = self._in_pool(number, blocks[rows[:, None], block])
        return chosen.long() * size + place % size


class QueryRows:
    """The last queries of requests that will soon be asked for them.

    Row ``r`` keeps the query of position ``p`` in place ``p % width``. Rows are lent and given
    back, since few requests are near to a boundary at a time.

    Args:
        layers: of the model.
        width: queries of a row.
    """

    def __init__(self, layers: int, width: int) -> None:
        self._layers, self.width = layers, width
        self._rows: Tensor | None = None
        self._free: list[int] = []
        self._made = 0

    def prepare(self, rows: int, query: Tensor) -> None:
        """Make ``rows`` rows at once, that stay where they are.

        Args:
            rows: most that are lent at a time.
            query: [query_heads, head_dim], of the type and device of queries.
        """
        shape = (self._layers, rows, self.width, *query.shape)
        self._rows = torch.zeros(shape, dtype=query.dtype, device=query.device)

    def ring(self, layer: int) -> Tensor | None:
        """[rows, width, query_heads, head_dim] of a layer; None if no query was ever wanted."""
        return None if self._rows is None else self._rows[layer]

    def lend(self, request: Tracked) -> int:
        """A row for a request."""
        if request.queries is None:
            if not self._free:
                self._free = [self._made]
                self._made += 1
            request.queries = heapq.heappop(self._free)
        return request.queries

    def give_back(self, requests: Sequence[Tracked]) -> None:
        """The requests need none any more."""
        for request in requests:
            if request.queries is not None:
                heapq.heappush(self._free, request.queries)
                request.queries = None

    def note(self, layer: int, query: Tensor, tokens: Tensor, rows: Tensor, places: Tensor) -> None:
        """Remember ``query[tokens]``; query is [n, query_heads, head_dim]."""
        self.ready(layer, query[0])[rows, places] = query[tokens]

    def ready(self, layer: int, query: Tensor) -> Tensor:
        """``ring`` with room for every row that is lent; query is [query_heads, head_dim]."""
        kept = self._rows
        if kept is None or kept.shape[1] < self._made:
            old = 0 if kept is None else kept.shape[1]
            more = query.new_zeros(
                self._layers, max(self._made - old, old), self.width, *query.shape
            )
            kept = self._rows = more if kept is None else torch.cat([kept, more], dim=1)
        return kept[layer]

    def read(self, layers: Tensor, rows: Tensor, positions: Tensor, kv_heads: int) -> Tensor:
        """Queries of (layer, row) pairs at positions.

        Args:
            layers, rows: [n] int64.
            positions: [n, q] int64, oldest first.
            kv_heads: heads per layer.

        Returns:
            [n, kv_heads, group, q, head_dim].
        """
        if self._rows is None:
            raise RuntimeError("no query was remembered")
        queries = self._rows[layers[:, None], rows[:, None], positions % self.width]
        return queries.transpose(1, 2).unflatten(1, (kv_heads, -1))
