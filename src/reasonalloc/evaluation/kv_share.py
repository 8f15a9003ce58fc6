"""KV bytes of arms, and their share of the 16-bit full cache: the axis of figures and tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reasonalloc.planning.memory import MemoryPlan

#: What ``kv_sizes`` adds to a row; rows of older versions do not have it.
SIZES = ("budget_tokens", "compressed_kv_bytes", "full_16bit_kv_bytes")


def kv_sizes(plan: MemoryPlan, tokens: int, full: bool = False) -> dict[str, Any]:
    """Return what a row says of the KV bytes of one sequence.

    Args:
        plan: of one sequence, with what is pinned of it.
        tokens: of the sequence at its end.
        full: whether it is the full cache's row: there is no budget then.

    Returns:
        ``budget_tokens``: mean tokens per layer and KV head right after a compression, pinned ones
        apart (None: no budget); ``compressed_kv_bytes``: KV bytes right after a compression, of the
        full cache all of them; ``full_16bit_kv_bytes``: of a full cache in 16 bits at this length.
    """
    return {
        "budget_tokens": None if full else plan.mean_tokens,
        "compressed_kv_bytes": plan.full_bytes(tokens) if full else plan.compressed_bytes(tokens),
        "full_16bit_kv_bytes": replace(plan, itemsize=2).full_bytes(tokens),
    }


@dataclass(frozen=True)
class Reference:
    """The full cache that counts as 100 %: in 16 bits, at the mean length of some sequences.

    Attributes:
        kv_bytes: of keys and values, mean.
        tokens: mean length at the end.
        whose: says of which sequences.
    """

    kv_bytes: float
    tokens: float
    whose: str

    @property
    def title(self) -> str:
        """What the axis shows."""
        return (
            f"KV bytes after a compression, % of the 16-bit full cache at {self.tokens:.0f} tokens "
            f"({self.whose})"
        )


def make_reference(sizes: Iterable[tuple[int | None, int]], whose: str) -> Reference | None:
    """Return the mean of (16-bit full bytes, tokens) of sequences; None if no bytes are known."""
    known = [(size, tokens) for size, tokens in sizes if size is not None]
    if not known:
        return None
    size, tokens = (sum(column) / len(known) for column in zip(*known, strict=True))
    return Reference(size, tokens, whose)


def sample_reference(
    samples: Sequence[Mapping[str, Any]], max_new_tokens: int | None
) -> Reference | None:
    """Return the reference of an evaluation: the full cache's samples, or all if it did not run.

    Args:
        samples: fields of samples.
        max_new_tokens: bound of each, said where the full cache did not run; None: unknown.
    """
    chosen = [sample for sample in samples if sample["budget"] is None]
    whose = "mean length with the full cache"
    if not chosen and samples:
        chosen, whose = list(samples), "mean length of all samples"
        if max_new_tokens is not None:
            longest = max(sample["prompt_tokens"] for sample in samples) + max_new_tokens
            whose += f", {longest} at most"
    # The last token is never fed.
    lengths = (s["prompt_tokens"] + s["completion_tokens"] - 1 for s in chosen)
    sizes = (s.get("full_16bit_kv_bytes") for s in chosen)
    return make_reference(zip(sizes, lengths, strict=True), whose)


def kv_summary(rows: Sequence[Mapping[str, Any]], reference: Reference | None) -> dict[str, Any]:
    """Return means over the rows of one arm and budget; None what rows of older versions lack.

    Returns:
        ``budget_tokens``, ``compressed_kv_bytes``, and ``kv_share``: these bytes by those of the
        reference, 1 is the 16-bit full cache.
    """
    tokens, size = (_mean(row.get(name) for row in rows) for name in SIZES[:2])
    if tokens is None and isinstance(rows[0]["budget"], int):
        tokens = float(rows[0]["budget"])
    share = None if size is None or reference is None else size / reference.kv_bytes
    return {
        "budget_tokens": None if tokens is None else round(tokens, 2),
        "compressed_kv_bytes": None if size is None else round(size),
        "kv_share": None if share is None else round(share, 6),
    }


def budget_name(item: Mapping[str, Any]) -> str:
    """Return the budget of a summary's entry: one in bytes with the tokens that it is."""
    budget, tokens = item["budget"], item["budget_tokens"]
    if isinstance(budget, str) and tokens is not None:
        return f"{budget} ({tokens:.0f} tokens)"
    return str(budget)


def share_text(share: float | None) -> str:
    """Return a share as a table shows it."""
    return "-" if share is None else f"{100 * share:.1f} %"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
