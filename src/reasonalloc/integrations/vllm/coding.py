"""How the older tokens of layers lie in vLLM's pages where they are kept in fewer bits.

A run then begins with pages of coded tokens, as many to a page as there is room for
(``ops.page_rows``), and goes on with pages of plain ones, the *tail*: the last ``window`` tokens at
its latest boundary and what came since. Tokens are coded at the end of a prefill for the first
time, and at every boundary after it, as on transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from reasonalloc.core.cadence import most_coded
from reasonalloc.ops.codes import row_format
from reasonalloc.ops.page_rows import PageRows


@dataclass(frozen=True)
class Share:
    """Heads that share coded tokens, in every way that they might be divided.

    Attributes:
        tokens: coded tokens of all of them, at most, besides pinned ones.
        heads: how many there are.
        per_page: tokens of a page.
    """

    tokens: int
    heads: int
    per_page: int

    def pages(self, pinned: int) -> int:
        """Most pages, if every head has so many pinned tokens besides."""
        most = self.tokens + self.heads * pinned
        return (most + self.heads * (self.per_page - 1)) // self.per_page


@dataclass(frozen=True)
class Coding:
    """The formats of the heads of a process.

    Attributes:
        window: most recent tokens of a run that stay as they are at a boundary.
        rows: the formats, none twice.
        of: [layers][kv_heads] which of ``rows``.
        planned: [layers][kv_heads] tokens that each head keeps, its window included; None: the
            heads of a layer share its total, and have one format.
    """

    window: int
    rows: tuple[PageRows, ...]
    of: tuple[tuple[int, ...], ...]
    planned: tuple[tuple[int, ...], ...] | None

    @classmethod
    def of_kinds(
        cls,
        kinds: Sequence[Sequence[str]],
        planned: Sequence[Sequence[int]] | None,
        window: int,
        dims: tuple[int, int],
        dtype: torch.dtype,
        block_size: int,
        channels: int,
    ) -> Self:
        """The coding of layers whose formats have names.

        Args:
            kinds: [layers][kv_heads], see ``ops.codes.parse_kinds``.
            planned, window: see the class.
            dims: numbers of a key and of a value.
            dtype: of the cache.
            block_size: plain tokens of a page.
            channels: numbers that the policy keeps of every token.
        """
        page = block_size * sum(dims) * dtype.itemsize
        names = sorted({kind for layer in kinds for kind in layer})
        return cls(
            window,
            tuple(PageRows(row_format(name, *dims, dtype), channels, page) for name in names),
            tuple(tuple(names.index(kind) for kind in layer) for layer in kinds),
            None if planned is None else tuple(tuple(layer) for layer in planned),
        )

    def rows_of(self, layer: int) -> tuple[PageRows, ...]:
        """The formats of a layer's heads."""
        return tuple(self.rows[number] for number in self.of[layer])

    def tail_pages(self, interval: int, block_size: int) -> int:
        """Pages of a tail, which grows by ``interval`` tokens until the next boundary."""
        return -(-(self.window + interval) // block_size)

    def most(self, layer: int, total: int) -> tuple[int, ...]:
        """Most coded tokens of each head of a layer that keeps ``total``, besides pinned ones."""
        heads = len(self.of[layer])
        if self.planned is None:
            return (most_coded(total, heads, self.window),) * heads
        return tuple(most_coded(tokens, 1, self.window) for tokens in self.planned[layer])

    def shares(self, layer: int, total: int) -> tuple[Share, ...]:
        """Heads of a layer that share coded tokens, or have some each."""
        most, rows = self.most(layer, total), self.rows_of(layer)
        if self.planned is None:
            return (Share(most[0], len(rows), rows[0].per_page),)
        return tuple(Share(tokens, 1, own.per_page) for own, tokens in zip(rows, most, strict=True))

    def pages(self, layer: int, total: int, pinned: int) -> int:
        """Most coded pages of a layer, its heads together, each with ``pinned`` tokens besides."""
        return sum(share.pages(pinned) for share in self.shares(layer, total))

    def longest(self, layer: int, total: int, pinned: int) -> int:
        """Most coded pages of one head of a layer, with ``pinned`` tokens besides."""
        most = self.most(layer, total)
        return max(own.pages(n + pinned) for own, n in zip(self.rows_of(layer), most, strict=True))

    def fewest(self, layer: int, total: int) -> int:
        """Most tokens of a sequence of which a layer keeps all in every head."""
        if self.planned is None:
            return total // len(self.of[layer])
        return min(self.planned[layer])
