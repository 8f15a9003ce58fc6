"""What the core computes at a boundary and, with fixed addresses, at every step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from reasonalloc.ops.codes import RowFormat


class Scorer(Protocol):
    """What scores candidates: a policy (``reasonalloc.policies``).

    Attributes:
        loop: name of the loop in C++ that computes the same scores, or None.
    """

    @property
    def loop(self) -> str | None:
        """See above."""
        ...

    def score(self, candidates: Any) -> Tensor:
        """[batch, kv_heads, n] float32."""
        ...


class Tables(Protocol):
    """Where the runs of the heads lie."""

    @property
    def offsets(self) -> Tensor:
        """[batch, kv_heads] int64, first slot of each head's run."""
        ...

    @property
    def lengths(self) -> Tensor:
        """[batch, kv_heads] int64, tokens in each head's run."""
        ...


class PerToken(Protocol):
    """What belongs to every token besides its key and value.

    Attributes:
        positions: [batch, slots] int32.
        state: [batch, slots, channels] float32, or None.
    """

    positions: Tensor
    state: Tensor | None


class Runs(Tables, Protocol):
    """Ragged storage of a layer, as attention reads it.

    Attributes:
        keys: [batch, slots, head_dim]; values: [batch, slots, value_dim].
    """

    keys: Tensor
    values: Tensor


class Storage(Runs, PerToken, Protocol):
    """The same with what belongs to every token."""


class CodedTokens(Tables, Protocol):
    """A layer whose older tokens are coded, as attention reads it.

    Attributes:
        pool: [batch, bytes] uint8, the runs.
        formats: of each KV head, how the bytes of a token lie.
        coded_slots: slots of the runs; behind them are those of the tails, ``room`` of each head.
        tail_keys: [batch, kv_heads, room, head_dim], contiguous.
        tail_values: [batch, kv_heads, room, value_dim], contiguous.
        tail_lengths: [batch, kv_heads] int64, tokens in each head's tail.
    """

    pool: Tensor
    formats: tuple[RowFormat, ...]
    coded_slots: int
    tail_keys: Tensor
    tail_values: Tensor
    tail_lengths: Tensor

    @property
    def starts(self) -> Tensor:
        """[batch, kv_heads] int64, first byte of each head's run in the pool."""
        ...


class CodedRuns(CodedTokens, PerToken, Protocol):
    """The same with what belongs to every token; slots are those of runs and tails."""


class Operations(ABC):
    """One implementation of all of them. Stateless."""

    def score(self, policy: Scorer, candidates: Any) -> Tensor:
        """Return ``policy.score(candidates)``, or the same from a faster loop."""
        return policy.score(candidates)

    @abstractmethod
    def robustify(
        self, demand: Tensor, total: Tensor, lower: Tensor, upper: Tensor, exponent: float
    ) -> Tensor:
        """Return ``clip(s * demand**exponent, lower, upper)``, rounded, with the sum ``total``.

        ``s`` is found exactly, not by bisection: the clipped sum is piecewise linear in ``s`` with
        a breakpoint where an entry leaves ``lower`` or reaches ``upper``. No host synchronisation.

        Args:
            demand: [..., n], non-negative.
            total: [...] int64, ``sum(lower) <= total <= sum(upper)``.
            lower, upper: [..., n] int64, ``lower <= upper``.
            exponent: flattens the demand (below 1) before it is scaled.

        Returns:
            [..., n] int64 budgets: they sum to ``total`` and lie within the bounds.
        """

    @abstractmethod
    def pooled_counts(
        self, scores: Tensor, lengths: Tensor, total: Tensor, window: int, scaled: bool
    ) -> Tensor:
        """Count the candidates of each head among the layer's best.

        ``k = total - kv_heads * window`` candidates are asked for over all heads, tau is the k-th
        largest score, and every candidate with ``score >= tau`` counts (ties included).

        Args:
            scores: [batch, kv_heads, n] float32; -inf where no candidate stands.
            lengths: [batch, kv_heads] int64, tokens of each head.
            total: [batch] int64, tokens that the layer may keep.
            window: always-kept recent tokens per head.
            scaled: multiply scores by the head's number of candidates first.

        Returns:
            [batch, kv_heads] int64.
        """

    @abstractmethod
    def select(
        self,
        scores: Tensor,
        lengths: Tensor,
        budgets: Tensor,
        window: int,
        recent_fraction: float = 0.0,
        forced: Tensor | None = None,
    ) -> Tensor:
        """Keep each head's most recent tokens and, of the others, those with the highest scores.

        ``max(window, floor(recent_fraction * budget))`` most recent tokens stay (fewer if the
        budget is smaller), but never so many that a forced token would have to go. Equal scores:
        the earlier token stays.

        Args:
            scores: [batch, kv_heads, n] float32; entries beyond ``lengths`` are ignored.
            lengths: [batch, kv_heads] int64.
            budgets: [batch, kv_heads] int64, at most ``lengths``.
            window: most recent tokens that stay.
            recent_fraction: see ``Policy.recent_fraction``.
            forced: [batch, kv_heads, n] bool, tokens outside the window that stay whatever their
                scores, or None.

        Returns:
            [batch, kv_heads, n] bool with exactly ``budgets`` true entries per head.
        """

    @abstractmethod
    def move(
        self,
        tensors: Sequence[tuple[Tensor, Tensor]],
        index: Tensor,
        keep: Tensor,
        offsets: Tensor,
    ) -> None:
        """Write kept rows into the runs that begin at ``offsets``, in their order.

        Args:
            tensors: pairs of [batch, slots, ...] to write to, and [batch, m, ...] to read from,
                which may be the same.
            index: [batch, kv_heads, n] int64, places in what is read.
            keep: [batch, kv_heads, n] bool.
            offsets: [batch, kv_heads] int64, first slot of each run.
        """

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Tensor,
        runs: Storage,
        ring: Tensor | None,
        scaling: float,
        softcap: float | None,
        need_weights: bool,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Store a token in every run, note its query and attend, all in one loop.

        Args:
            query: [batch, query_heads, 1, head_dim].
            key, value: [batch, kv_heads, 1, dim], in the types of the storage.
            seen: [batch] int64, position of the token.
            runs: the storage, ragged.
            ring: [batch, window, query_heads, head_dim] where the query is noted, or None.
            scaling, softcap: of the attention logits.
            need_weights: also return what each slot received.
            sinks: [query_heads] learned sinks, see ``reasonalloc.sinks``, or None.

        Returns:
            As ``Backend.decode``; None if there is no such loop for these types: nothing was done.
        """
        return None

    def step_coded(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Tensor,
        runs: CodedRuns,
        ring: Tensor | None,
        scaling: float,
        softcap: float | None,
        need_weights: bool,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Do the same as ``step`` where older tokens are coded: the new one goes into the tails.

        Args:
            query, key, value, seen, ring, scaling, softcap, need_weights, sinks: see ``step``.
            runs: the storage.

        Returns:
            As ``Backend.decode_coded``; None if there is no such loop for these types: nothing was
            done.
        """
        return None
