"""One decode step of a layer: store the token, note its query, attend, update the state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from reasonalloc.attention import Backend
from reasonalloc.cache import Slab
from reasonalloc.core.observation import observe_step
from reasonalloc.core.progress import Progress
from reasonalloc.core.window import QueryWindow
from reasonalloc.ops import Operations
from reasonalloc.policies import Policy


@dataclass
class Held:
    """What a layer holds: its tokens, the queries of its window, its counters."""

    slab: Slab
    queries: QueryWindow | None
    progress: Progress


class Step(ABC):
    """How a decode step runs.

    Args:
        policy, backend, ops: of the layer.
    """

    def __init__(self, policy: Policy, backend: Backend, ops: Operations) -> None:
        self._policy, self._backend, self._ops = policy, backend, ops

    def run(
        self,
        held: Held,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Do the device's part of a step.

        Args:
            held: changed in place.
            query: [batch, query_heads, 1, head_dim].
            key, value: [batch, kv_heads, 1, dim], in the types of the slab.
            valid: [batch, 1] bool, false where the token is padding; None if all are real.
            scaling, softcap: of the attention logits.

        Returns:
            [batch, query_heads, 1, value_dim].
        """
        out, received = self._attend(held, query, key, value, valid, scaling, softcap)
        slab, progress = held.slab, held.progress
        if received is not None:
            group = query.shape[1] // slab.kv_heads
            observe_step(self._policy, slab, received, group, progress.seen, valid)
        progress.note(valid)
        return out

    @property
    def _watching(self) -> bool:
        return self._policy.state_channels > 0

    @abstractmethod
    def _attend(
        self,
        held: Held,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Store, note and attend; as ``Backend.decode``."""


class EagerStep(Step):
    """Reads lengths and positions where they are: on the host while sequences are alike."""

    def _attend(
        self,
        held: Held,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        slab, seen = held.slab, held.progress.seen
        slab.append(key, value, seen, valid)
        if held.queries is not None:
            held.queries.push(query, seen, valid)
        return self._backend.decode(query, slab, scaling, softcap, self._watching)


class FixedStep(Step):
    """Reads nothing that the host knows, so that a captured step may be replayed.

    Lengths, offsets and positions are on the device, where they stay at one address, and so do
    keys, values, queries and the policy's state.
    """

    def _attend(
        self,
        held: Held,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        valid: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        slab, queries = held.slab, held.queries
        seen = held.progress.spread(slab.batch, key.device)
        if valid is None:
            ring = None if queries is None else queries.ring
            result = self._ops.step(
                query, key, value, seen, slab, ring, scaling, softcap, self._watching
            )
            if result is not None:
                return result
        slab.store(key, value, seen, valid)
        if queries is not None:
            queries.push(query, seen, valid)
        return self._backend.decode(query, slab, scaling, softcap, self._watching)
