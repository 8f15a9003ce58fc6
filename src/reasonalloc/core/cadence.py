"""When a layer is compressed, and what it holds then: numbers that every engine derives alike.

A boundary stands at the end of a prefill of ``start`` tokens and after every ``interval`` decode
steps from there. At a boundary a layer is compressed that holds more than its total; from its first
compression on it is, at every boundary. All of it follows from numbers of tokens alone, so a
scheduler and its workers know it without telling each other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cadence:
    """The boundaries of a sequence.

    Attributes:
        interval: decode steps between two boundaries, at least 1.
    """

    interval: int

    def boundary(self, start: int, tokens: int) -> int:
        """Return the first boundary at or after ``tokens`` tokens, of a prefill of ``start``."""
        over = max(tokens - start, 0)
        return start + -(-over // self.interval) * self.interval

    def compressions(self, start: int, tokens: int, overflow: int) -> range:
        """Return the tokens of a sequence at each compression up to ``tokens`` tokens.

        In a batch the same events happen to a sequence, besides some that leave it as it is.

        Args:
            start: tokens of the prefill.
            tokens: tokens so far.
            overflow: tokens from which on the layer is over its budget, see ``overflow``.
        """
        return range(self.boundary(start, overflow), tokens + 1, self.interval)

    def held(self, start: int, tokens: int, total: int, kv_heads: int, pinned: int = 0) -> int:
        """Return the tokens that a layer holds of a sequence, all its KV heads together.

        Args:
            start: tokens of the prefill.
            tokens: tokens so far.
            total: tokens that the layer keeps after a compression.
            kv_heads: its KV heads.
            pinned: tokens of the prefill that every head keeps on top of it.
        """
        first = self.boundary(start, overflow(total, kv_heads) + pinned)
        if tokens < first:
            return kv_heads * tokens
        return total + kv_heads * (pinned + (tokens - first) % self.interval)


def compression_points(
    total: int, kv_heads: int, interval: int, prompt: int, steps: int, pinned: int = 0
) -> list[int]:
    """Return when a layer is compressed while one sequence is prefilled and decoded alone.

    Args:
        total: tokens that the layer keeps after a compression, all KV heads together.
        kv_heads: KV heads of the layer.
        interval: decode steps between two boundaries.
        prompt: tokens of the prompt.
        steps: decode steps after it; the last generated token is not among them.
        pinned: tokens of the prompt that are kept on top of the total.

    Returns:
        Tokens of the sequence at each compression, rising.
    """
    least = overflow(total, kv_heads) + pinned
    return [*Cadence(interval).compressions(prompt, prompt + steps, least)]


def overflow(total: int, kv_heads: int) -> int:
    """Return the least tokens of a sequence at which a layer holds more than it may keep.

    Args:
        total: tokens that the layer keeps after a compression, all its KV heads together.
        kv_heads: KV heads of the layer.
    """
    return total // kv_heads + 1


def most_held(total: int, kv_heads: int, interval: int, pinned: int = 0) -> int:
    """Return the most tokens that a layer holds once it was compressed, all KV heads together.

    That is its total and the growth of every head up to the next boundary, besides ``pinned``
    tokens of every head.
    """
    return total + kv_heads * (interval + pinned)


def most_coded(total: int, kv_heads: int, window: int, pinned: int = 0) -> int:
    """Return the most tokens that a layer holds in fewer bits, all KV heads together.

    Args:
        total: tokens that the layer keeps after a compression, besides pinned ones.
        kv_heads: its KV heads.
        window: most recent tokens of a head, which stay as they are.
        pinned: tokens that every head keeps besides.
    """
    return total + kv_heads * (pinned - window)


def slots(
    total: int, kv_heads: int, interval: int, pinned: int = 0, window: int | None = None
) -> int:
    """Return the slots of a layer and sequence, all KV heads together.

    Args:
        total, kv_heads, interval, pinned: see ``most_held``.
        window: most recent tokens of a head that stay as they are, where older ones are kept in
            fewer bits; None where they are not.
    """
    if window is None:
        return most_held(total, kv_heads, interval, pinned)
    return most_coded(total, kv_heads, window, pinned) + kv_heads * (window + interval)
