"""Coded tokens in pages: how many there are in one, and what lies beside each of them.

A page of a pool that holds plain tokens, or tokens in fewer bits, is the same number of bytes. Of
coded ones it holds as many rows as there is room for, one behind the other from its first byte on:

    [row of ``codes.RowFormat``][padding][position, int32][numbers of the policy, float32]

Rows begin at multiples of four bytes. What a policy keeps of every token lies beside it: pages hold
more coded tokens than plain ones, and tables for the most that there can be would be large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.ops.codes import RowFormat


@dataclass(frozen=True)
class PageRows:
    """How coded tokens of one head lie in a page.

    Attributes:
        form: of keys and values.
        channels: numbers that the policy keeps of every token.
        page_bytes: of a page.
    """

    form: RowFormat
    channels: int
    page_bytes: int

    @property
    def beside_at(self) -> int:
        """First byte of the position; the policy's numbers come behind it."""
        return -(-self.form.width // 4) * 4

    @property
    def width(self) -> int:
        """Bytes from row to row."""
        return self.beside_at + 4 * (1 + self.channels)

    @property
    def per_page(self) -> int:
        """Tokens of a page."""
        return self.page_bytes // self.width

    def pages(self, tokens: int) -> int:
        """Pages of a run of coded tokens."""
        return -(-tokens // self.per_page)

    def view(self, pages: Tensor) -> Tensor:
        """[pages, per_page, width] uint8 of pages [pages, page_bytes] uint8: the same memory."""
        used = pages[:, : self.per_page * self.width]
        rows: Tensor = used.unflatten(1, (self.per_page, self.width))
        return rows

    def encode(self, keys: Tensor, values: Tensor, positions: Tensor, state: Tensor) -> Tensor:
        """Rows [..., width] uint8.

        Args:
            keys, values: [..., dim].
            positions: [...] int32.
            state: [..., channels] float32.
        """
        form = self.form
        row = keys.new_zeros(*keys.shape[:-1], self.width, dtype=torch.uint8)
        row[..., : form.width] = form.encode(keys, values)
        at = self.beside_at
        row[..., at : at + 4] = positions.int()[..., None].contiguous().view(torch.uint8)
        if self.channels:
            row[..., at + 4 :] = state.contiguous().view(torch.uint8)
        return row

    def decode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., dim] float32 (``auto``: as they are) of rows [..., width]."""
        return self.form.decode(rows[..., : self.form.width])

    def positions(self, rows: Tensor) -> Tensor:
        """[...] int32 of rows [..., width]."""
        at = self.beside_at
        return rows[..., at : at + 4].contiguous().view(torch.int32)[..., 0]

    def state(self, rows: Tensor) -> Tensor:
        """[..., channels] float32 of rows [..., width]."""
        return rows[..., self.beside_at + 4 :].contiguous().view(torch.float32)
