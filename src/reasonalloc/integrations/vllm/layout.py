"""Where the tokens of a request lie among its blocks, in numbers that every process derives alike.

A block holds ``block_size`` tokens of every (layer, KV head): ``layers * kv_heads`` pages. While a
request is not compressed, page (layer, head) of its block ``j`` holds tokens ``j * block_size`` and
on of that head, as vLLM does it. At its first compression the request moves to a constant number
of blocks, whose pages are dealt out anew: every layer gets as many as its budget and its growth
need, and the heads of a layer share those. From then on it needs no block more, however long it
gets. When that happens follows from the number of tokens alone, so scheduler and workers know it
without telling each other.

A pinned prompt stays where it is: its full blocks are never written again, so that other requests
can share them, and only what comes behind them moves. A prompt that is evicted from, or whose
tokens are coded, is shared until the first compression of a request: the compressed runs go to
blocks that nobody else holds, and the old ones are given back with their contents. In every case
the runs are in the *last* blocks that a request has at its first compression, as many as
``Reserve.own`` says; how many there are before them is the number of its blocks, which the
scheduler tells its workers anyway.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from reasonalloc.core.cadence import Cadence, most_held
from reasonalloc.integrations.vllm.coding import Coding, Share
from reasonalloc.integrations.vllm.windows import NO_WINDOWS, Windows

_KEPT_OFFSETS = 1024  # of prompts of so many lengths


@dataclass(frozen=True)
class Coded:
    """Pages of a process whose runs begin with coded tokens.

    Attributes:
        per_block: pages of a block.
        tails: pages of plain tokens.
        shares: of coded ones, and how many alike.
    """

    per_block: int
    tails: int
    shares: tuple[tuple[Share, int], ...]

    def blocks(self, pinned: int) -> int:
        """Blocks that hold all of them, and ``pinned`` tokens of every head besides."""
        coded = sum(count * share.pages(pinned) for share, count in self.shares)
        return -(-(self.tails + coded) // self.per_block)


@dataclass(frozen=True)
class Reserve:
    """What the scheduler must know.

    Attributes:
        block_size: tokens of a block.
        interval: tokens between two boundaries.
        overflow: tokens at which a boundary is the first to compress some layer, besides pinned
            ones.
        blocks: blocks of a request from its first compression on, but for what is pinned.
        pin: prompts stay, on top of the budget.
        windows: what layers with sliding windows take besides; all else is of layers under the
            budget.
        observed: last tokens before the first compression that every request computes itself,
            since the policy looks at their attention; None: all of them.
        coded: where older tokens are kept in fewer bits, from the end of the prefill on: what
            they take in every process; nothing where they are not.
    """

    block_size: int
    interval: int
    overflow: int
    blocks: int
    pin: bool = False
    windows: Windows = NO_WINDOWS
    observed: int | None = 0
    coded: tuple[Coded, ...] = ()
    _own: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def pinned(self, start: int) -> int:
        """Tokens that stay on top of the budget, of a prefill of ``start``."""
        return start if self.pin else 0

    def leading(self, start: int) -> int:
        """Blocks that stay as they are, of a prefill of ``start`` tokens."""
        return start // self.block_size if self.stays else 0

    def own(self, start: int) -> int:
        """Blocks of a request's compressed runs, of a prefill of ``start`` tokens."""
        if not (self.pin and self.coded):
            return self.blocks
        if start not in self._own:
            self._own[start] = max(process.blocks(start) for process in self.coded)
        return self._own[start]

    def held(self, start: int) -> int:
        """Blocks of a request from its first compression on."""
        return self.leading(start) + self.own(start)

    @property
    def cadence(self) -> Cadence:
        """The boundaries of a request."""
        return Cadence(self.interval)

    def first_event(self, start: int) -> int:
        """Tokens at the first compression of a request whose prefill has ``start`` tokens.

        That is when its tokens move for the first time: some are evicted, or coded.
        """
        least = 1 if self.coded else self.overflow + self.pinned(start)
        return self.cadence.boundary(start, least)

    def needed(self, start: int, tokens: int, shared: int = 0) -> int:
        """Blocks that must be there for a step that ends with ``tokens`` tokens in the cache.

        Args:
            start: tokens of the prefill.
            tokens: in the cache at the end of the step.
            shared: first blocks of the request that may not be written, since others hold them too.
        """
        first = self.first_event(start)
        if tokens > first:
            return self.held(start)
        plain = -(-tokens // self.block_size)
        if tokens < first:
            return plain
        return max(plain, self.held(start), shared + self.own(start))

    def peak(self, start: int, last: int, shared: int = 0) -> int:
        """Most blocks that a request needs that ends with ``last`` tokens in the cache.

        Args:
            start: tokens of the prefill.
            last: in the cache at the end.
            shared: most of its first blocks that others hold too, at its first compression.
        """
        top = min(last, self.first_event(start))
        return max(self.needed(start, top, shared), self.needed(start, last, shared))

    @property
    def stays(self) -> bool:
        """Whether full blocks of prompts are never written again."""
        return self.pin and not self.coded

    @property
    def shares(self) -> bool:
        """Whether requests may share blocks of their prompts."""
        return self.pin or self.observed is not None

    def most_shared(self, start: int, pool: int) -> int:
        """Most blocks of a prefill of ``start`` tokens that other requests may hold too.

        Args:
            start: tokens of the prefill.
            pool: blocks that there are; they hold the shared ones and, besides, those of the
                request's first compression and of its windows.
        """
        if self.stays or not self.shares:
            return self.leading(start)
        room = pool - self.own(start) - self.windows.peak(start, 1 << 60)
        return max(min(start // self.block_size, room), 0)

    def most_cached(self, start: int, pool: int) -> int:
        """Most tokens of a prefill of ``start`` that a request may have from others.

        Args:
            start: tokens of the prefill.
            pool: blocks that there are.
        """
        if self.stays:
            return start - 1
        # What is pinned is not scored, so nobody looks at the attention in which it is computed.
        observed = 0 if self.pin else self.observed or 0
        before = min(start - 1, self.first_event(start) - observed)
        return max(min(before, self.most_shared(start, pool) * self.block_size), 0)

    def compressions(self, start: int, tokens: int) -> int:
        """Boundaries up to ``tokens`` tokens at which some layer was over its budget."""
        least = self.overflow + self.pinned(start)
        return len(self.cadence.compressions(start, tokens, least))


@dataclass(frozen=True)
class Layout:
    """What a worker must know: of its own KV heads.

    Attributes:
        reserve: what the scheduler knows.
        totals: tokens that each layer keeps, its heads in this process together.
        kv_heads: KV heads of a layer in this process.
        coding: how older tokens lie in fewer bits; None: they do not.
    """

    reserve: Reserve
    totals: tuple[int, ...]
    kv_heads: int
    coding: Coding | None = None
    _offsets: dict[int, tuple[int, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def pages(self, start: int = 0) -> tuple[int, ...]:
        """Pages of each layer after the first compression, of a prefill of ``start`` tokens."""
        return tuple(self._pages(layer, start) for layer in range(len(self.totals)))

    def _pages(self, layer: int, start: int) -> int:
        """Enough for any division of a layer's total among the heads, each growing."""
        reserve, heads, total = self.reserve, self.kv_heads, self.totals[layer]
        size, interval = reserve.block_size, reserve.interval
        if self.coding is not None:
            tails = heads * self.coding.tail_pages(interval, size)
            return self.coding.pages(layer, total, reserve.pinned(start)) + tails
        # Of a pinned prompt what its full blocks leave, and of every head's run an end of a page.
        besides = heads * (size - 1) * (2 if reserve.pin else 1)
        return (most_held(total, heads, interval) + besides) // size

    def longest_run(self, start: int) -> int:
        """Most pages of a run that is coded, of a prefill of ``start`` tokens."""
        if self.coding is None:
            raise RuntimeError("runs that are not coded")
        reserve, pinned = self.reserve, self.reserve.pinned(start)
        coded = [self.coding.longest(n, total, pinned) for n, total in enumerate(self.totals)]
        return max(coded) + self.coding.tail_pages(reserve.interval, reserve.block_size)

    def most_coded(self, start: int) -> int:
        """Most coded tokens of a run, of a prefill of ``start`` tokens."""
        if self.coding is None:
            return 0
        most = max(max(self.coding.most(n, total)) for n, total in enumerate(self.totals))
        return most + self.reserve.pinned(start)

    def offsets(self, start: int) -> tuple[int, ...]:
        """First page of each layer, of a prefill of ``start`` tokens."""
        pinned = 0 if self.coding is None else self.reserve.pinned(start)
        if pinned not in self._offsets:
            if len(self._offsets) >= _KEPT_OFFSETS:
                self._offsets.clear()
            self._offsets[pinned] = (0, *accumulate(self.pages(pinned)))[:-1]
        return self._offsets[pinned]

    def held(self, layer: int, start: int, tokens: int) -> int:
        """Tokens that a layer holds of a request of ``tokens`` tokens, its heads together."""
        cadence, pinned = self.reserve.cadence, self.reserve.pinned(start)
        total, heads = self.totals[layer], self.kv_heads
        if self.coding is None or self.coding.planned is None:
            return cadence.held(start, tokens, total, heads, pinned)
        planned = self.coding.planned[layer]  # and never more, whatever the others leave
        return sum(cadence.held(start, tokens, own, 1, pinned) for own in planned)

    def is_due(self, layer: int, start: int, tokens: int) -> bool:
        """Whether a boundary at ``tokens`` tokens compresses the layer; once so, always so."""
        return tokens >= self._least(layer, start)

    def first_due(self, layer: int, start: int) -> int:
        """Tokens at the first boundary that compresses the layer."""
        return self.reserve.cadence.boundary(start, self._least(layer, start))

    def _least(self, layer: int, start: int) -> int:
        return self.fewest(layer) + 1 + self.reserve.pinned(start)

    def fewest(self, layer: int) -> int:
        """Most tokens of a sequence of which a layer keeps all, besides pinned ones."""
        if self.coding is not None:
            return self.coding.fewest(layer, self.totals[layer])
        return self.totals[layer] // self.kv_heads


def make_layouts(
    totals: Sequence[Sequence[int]],
    kv_heads: int,
    interval: int,
    block_size: int,
    pin: bool = False,
    windows: Windows = NO_WINDOWS,
    observed: int | None = 0,
    codings: Sequence[Coding] | None = None,
) -> tuple[Layout, ...]:
    """Layouts of all processes of an engine.

    Args:
        totals: [processes][layers] tokens, of the layers and heads that each of them holds.
        kv_heads: KV heads of a layer in a process.
        interval: tokens between two boundaries.
        block_size: tokens of a block.
        pin: prompts stay, on top of the budget.
        windows: of layers beside those under the budget.
        observed: see ``Reserve``.
        codings: of each process; None: tokens are kept as they are.
    """
    reserve = Reserve(block_size, interval, 0, 0, pin, windows, observed)
    own: Sequence[Coding | None] = codings or [None] * len(totals)
    layouts = [
        Layout(reserve, tuple(layers), kv_heads, coding)
        for layers, coding in zip(totals, own, strict=True)
    ]
    every = [layout.fewest(layer) for layout in layouts for layer in range(len(layout.totals))]
    blocks = [-(-sum(each.pages()) // (len(each.totals) * kv_heads)) for each in layouts]
    coded = tuple(_coded(layout, layout.coding) for layout in layouts if layout.coding is not None)
    known = Reserve(
        block_size, interval, min(every) + 1, max(blocks), pin, windows, observed, coded
    )
    return tuple(dataclasses.replace(layout, reserve=known) for layout in layouts)


def _coded(layout: Layout, coding: Coding) -> Coded:
    """What a process takes, for the scheduler."""
    heads, layers = layout.kv_heads, len(layout.totals)
    tails = coding.tail_pages(layout.reserve.interval, layout.reserve.block_size)
    shares = Counter(
        share for layer, total in enumerate(layout.totals) for share in coding.shares(layer, total)
    )
    return Coded(layers * heads, layers * heads * tails, tuple(shares.items()))
