"""The loops in C++ as ``Operations``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from reasonalloc.ops.interface import CodedRuns, Operations, PerToken, Scorer, Storage
from reasonalloc.ops.native import coded, rkv
from reasonalloc.ops.native.attention import NewToken, step
from reasonalloc.ops.native.budgets import pooled_counts, robustify, select
from reasonalloc.ops.native.rows import move_rows


class NativeOperations(Operations):
    """Loops for tensors on a CPU; see ``ops.native.build`` for when they are compiled."""

    def score(self, policy: Scorer, candidates: Any) -> Tensor:
        """See ``Operations.score``; R-KV's have a loop."""
        scores = rkv.score(policy, candidates)
        return policy.score(candidates) if scores is None else scores

    def robustify(
        self, demand: Tensor, total: Tensor, lower: Tensor, upper: Tensor, exponent: float
    ) -> Tensor:
        """See ``Operations.robustify``."""
        return robustify(demand, total, lower, upper, exponent)

    def pooled_counts(
        self, scores: Tensor, lengths: Tensor, total: Tensor, window: int, scaled: bool
    ) -> Tensor:
        """See ``Operations.pooled_counts``."""
        return pooled_counts(scores, lengths, total, window, scaled)

    def select(
        self,
        scores: Tensor,
        lengths: Tensor,
        budgets: Tensor,
        window: int,
        recent_fraction: float = 0.0,
        forced: Tensor | None = None,
    ) -> Tensor:
        """See ``Operations.select``."""
        return select(scores, lengths, budgets, window, recent_fraction, forced)

    def move(
        self,
        tensors: Sequence[tuple[Tensor, Tensor]],
        index: Tensor,
        keep: Tensor,
        offsets: Tensor,
    ) -> None:
        """See ``Operations.move``."""
        for own, flat in tensors:
            move_rows(own, flat, index, keep, offsets)

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
        """See ``Operations.step``; under autocast the query may be of another type than noted."""
        new = _new_token(query, key, value, seen, runs, ring)
        if new is None:
            return None
        return step(query, runs, new, scaling, softcap, need_weights, sinks)

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
        """See ``Operations.step_coded``; under autocast as ``step``."""
        new = _new_token(query, key, value, seen, runs, ring)
        if new is None:
            return None
        return coded.step(query, runs, new, scaling, softcap, need_weights, sinks)


def _new_token(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, runs: PerToken, ring: Tensor | None
) -> NewToken | None:
    """Return what is stored before a query attends; None if the query cannot be noted."""
    if ring is not None and ring.dtype != query.dtype:
        return None
    return NewToken(key, value, runs.positions, seen, runs.state, ring)


NATIVE = NativeOperations()
