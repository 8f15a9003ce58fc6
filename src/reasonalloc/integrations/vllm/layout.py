"""Where the tokens of a request lie among its blocks, in numbers that every process derives alike.

A block holds ``block_size`` tokens of every (layer, KV head): ``layers * kv_heads`` pages. While a
request is not compressed, page (layer, head) of its block ``j`` holds tokens ``j * block_size`` and
on of that head, as vLLM does it. At its first compression the request moves to a constant number
of blocks, whose pages are dealt out anew: every layer gets as many as its budget and its growth
need, and the heads of a layer share those. From then on it needs no block more, however long it
gets. When that happens follows from the number of tokens alone, so scheduler and workers know it
without telling each other.

A pinned prompt stays where it is: its full blocks are never written again, so that other requests
can share them, and only what comes behind them moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from reasonalloc.core.cadence import Cadence, most_held, overflow
from reasonalloc.integrations.vllm.windows import NO_WINDOWS, Windows


@dataclass(frozen=True)
class Reserve:
    """What the scheduler must know.

    Attributes:
        block_size: tokens of a block.
        interval: tokens between two boundaries.
        overflow: tokens at which a boundary is the first to compress some layer, besides pinned
            ones.
        blocks: blocks of a request from its first compression on, besides those of ``leading``.
        pin: prompts stay, on top of the budget.
        windows: what layers with sliding windows take besides; all else is of layers under the
            budget.
    """

    block_size: int
    interval: int
    overflow: int
    blocks: int
    pin: bool = False
    windows: Windows = NO_WINDOWS

    def pinned(self, start: int) -> int:
        """Tokens that stay on top of the budget, of a prefill of ``start``."""
        return start if self.pin else 0

    def leading(self, start: int) -> int:
        """Blocks that stay as they are, of a prefill of ``start`` tokens."""
        return self.pinned(start) // self.block_size

    def held(self, start: int) -> int:
        """Blocks of a request from its first compression on."""
        return self.leading(start) + self.blocks

    @property
    def cadence(self) -> Cadence:
        """The boundaries of a request."""
        return Cadence(self.interval)

    def first_event(self, start: int) -> int:
        """Tokens at the first compression of a request whose prefill has ``start`` tokens."""
        return self.cadence.boundary(start, self.overflow + self.pinned(start))

    def needed(self, start: int, tokens: int) -> int:
        """Blocks that must be there for a step that ends with ``tokens`` tokens in the cache."""
        first = self.first_event(start)
        if tokens > first:
            return self.held(start)
        plain = -(-tokens // self.block_size)
        return plain if tokens < first else max(plain, self.held(start))

    def peak(self, start: int, last: int) -> int:
        """Most blocks that a request needs that ends with ``last`` tokens in the cache."""
        return max(self.needed(start, min(last, self.first_event(start))), self.needed(start, last))

    def compressions(self, start: int, tokens: int) -> int:
        """Boundaries up to ``tokens`` tokens at which some layer was compressed."""
        least = self.overflow + self.pinned(start)
        return len(self.cadence.compressions(start, tokens, least))


@dataclass(frozen=True)
class Layout:
    """What a worker must know: of its own KV heads.

    Attributes:
        reserve: what the scheduler knows.
        totals: tokens that each layer keeps, its heads in this process together.
        kv_heads: KV heads of a layer in this process.
    """

    reserve: Reserve
    totals: tuple[int, ...]
    kv_heads: int

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages of each layer after the first compression."""
        return tuple(_pages(total, self.kv_heads, self.reserve) for total in self.totals)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First page of each layer."""
        return (0, *accumulate(self.pages))[:-1]

    def is_due(self, layer: int, start: int, tokens: int) -> bool:
        """Whether a boundary at ``tokens`` tokens compresses the layer; once so, always so."""
        return tokens >= self._least(layer, start)

    def first_due(self, layer: int, start: int) -> int:
        """Tokens at the first boundary that compresses the layer."""
        return self.reserve.cadence.boundary(start, self._least(layer, start))

    def _least(self, layer: int, start: int) -> int:
        return overflow(self.totals[layer], self.kv_heads) + self.reserve.pinned(start)


def _pages(total: int, kv_heads: int, reserve: Reserve) -> int:
    """Enough for any division of ``total`` among the heads, each growing by ``interval``."""
    size = reserve.block_size
    # Of a pinned prompt what its full blocks leave, and of every head's run an end of a page.
    besides = kv_heads * (size - 1) * (2 if reserve.pin else 1)
    return (most_held(total, kv_heads, reserve.interval) + besides) // size


def make_layouts(
    totals: Sequence[Sequence[int]],
    kv_heads: int,
    interval: int,
    block_size: int,
    pin: bool = False,
    windows: Windows = NO_WINDOWS,
) -> tuple[Layout, ...]:
    """Layouts of all tensor-parallel ranks.

    Args:
        totals: [ranks][layers] tokens, the heads of that rank together.
        kv_heads: KV heads per layer and rank.
        interval: tokens between two boundaries.
        block_size: tokens of a block.
        pin: prompts stay, on top of the budget.
        windows: of layers beside those under the budget.
    """
    least = min(total for layers in totals for total in layers)
    reserve = Reserve(block_size, interval, overflow(least, kv_heads), 0, pin, windows)
    whole = [sum(_pages(total, kv_heads, reserve) for total in layers) for layers in totals]
    per_block = len(totals[0]) * kv_heads
    reserve = dataclasses.replace(reserve, blocks=-(-max(whole) // per_block))
    return tuple(Layout(reserve, tuple(layers), kv_heads) for layers in totals)
