"""Layers with sliding windows, beside those under a budget: how many blocks they take.

vLLM divides the layers of a model into groups of equally many, each of one kind. Every group has
blocks of its own for a request, all from one pool; those behind a window go back to it. What a
group holds at most follows from token counts alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reasonalloc.planning.memory import LayerShape


@dataclass(frozen=True)
class Groups:
    """How vLLM divides layers into groups.

    Attributes:
        layers: of a group at most; a block has room for as many.
        full: groups of layers without a window.
        widths: tokens of the window of each other group.
    """

    layers: int
    full: int
    widths: tuple[int, ...]


def divide(shapes: Sequence[LayerShape]) -> Groups:
    """The groups of layers that all have a cache; see ``kv_cache_utils`` of vLLM."""
    counts = Counter(shape.sliding_window for shape in shapes)
    least, most = min(counts.values()), max(counts.values())
    layers = most if most < 1.5 * least else least
    groups = {width: -(-count // layers) for width, count in counts.items()}
    widths = (width for width, many in groups.items() if width for _ in range(many))
    return Groups(layers, groups.get(None, 0), tuple(widths))


@dataclass(frozen=True)
class Windows:
    """Blocks that a request takes for layers with sliding windows.

    Attributes:
        widths: tokens of each group's window; none without such layers.
        block_size: tokens of a block.
        in_flight: most tokens that are scheduled and not computed at a time; None: any number.
        steps: most steps that are scheduled and not computed at a time, the new one included.
    """

    widths: tuple[int, ...] = ()
    block_size: int = 1
    in_flight: int | None = None
    steps: int = 1

    def prefill(self, tokens: int) -> int:
        """Most blocks up to ``tokens`` tokens, until a prefill is known to be computed."""
        return self._most(tokens, tokens if self.in_flight is None else self.in_flight)

    def decode(self, tokens: int) -> int:
        """Most blocks up to ``tokens`` tokens, from then on."""
        return self._most(tokens, self.steps)

    def decodes(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """``decode`` of each."""
        blocks = np.zeros_like(tokens)
        for width in self.widths:
            blocks += np.minimum(-(-tokens // self.block_size), self._wide(width, self.steps))
        return blocks

    def peak(self, start: int, last: int) -> int:
        """Most blocks of a request with a prefill of ``start`` tokens and ``last`` in all."""
        return max(self.prefill(min(start + self.steps, last)), self.decode(last))

    def held(self, tokens: int) -> int:
        """Blocks after a decode step that ends with ``tokens`` tokens, no other in flight."""
        whole = -(-tokens // self.block_size)
        return sum(whole - max(tokens - width, 0) // self.block_size for width in self.widths)

    def _most(self, tokens: int, new: int) -> int:
        whole = -(-tokens // self.block_size)
        return sum(min(whole, self._wide(width, new)) for width in self.widths)

    def _wide(self, width: int, new: int) -> int:
        """Windows before the first of ``new`` tokens begin anywhere in a block."""
        return -(-(width - 1 + new) // self.block_size) + 1


NO_WINDOWS = Windows()
