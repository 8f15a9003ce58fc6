"""One decode step of a layer: store the token, note its query, attend, update the state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from reasonalloc.attention import Backend
from reasonalloc.attention.distance import DistanceBias
from reasonalloc.attention.latent import LatentHeads
from reasonalloc.cache import AnySlab, CodedSlab
from reasonalloc.core.observation import observe_step
from reasonalloc.core.progress import Progress
from reasonalloc.core.window import QueryWindow
from reasonalloc.ops import Operations
from reasonalloc.policies import Policy


@dataclass
class Held:
    """What a layer holds: its tokens, the queries of its window, its counters.

    Attributes:
        latent: how heads read the tokens, if these are latents; else None.
        bias: how queries with a bias by distance are read; None if they have none.
    """

    slab: AnySlab
    queries: QueryWindow | None
    progress: Progress
    latent: LatentHeads | None = None
    bias: DistanceBias | None = None


class Logits(NamedTuple):
    """How attention logits become weights.

    Attributes:
        scaling, softcap: of the logits.
        sinks: [query_heads] learned sinks, see ``reasonalloc.sinks``, or None.
    """

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass
class StepInput:
    """What a decode step brings.

    Attributes:
        query: [batch, query_heads, 1, head_dim].
        key, value: [batch, kv_heads, 1, dim], in the types of the slab.
        valid: [batch, 1] bool, false where the token is padding; None if all are real.
        logits: of the attention.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor | None
    logits: Logits


class Step(ABC):
    """How a decode step runs.

    Args:
        policy, backend, ops: of the layer.
    """

    def __init__(self, policy: Policy, backend: Backend, ops: Operations) -> None:
        self._policy, self._backend, self._ops = policy, backend, ops
        self._watching = policy.state_channels > 0

    def run(self, held: Held, new: StepInput) -> Tensor:
        """Do the device's part of a step; ``held`` is changed in place.

        Returns:
            [batch, query_heads, 1, value_dim].
        """
        out, received = self._attend(held, new)
        self._count(held, new, received)
        return out

    @abstractmethod
    def store(self, held: Held, new: StepInput) -> None:
        """Store the new token; its query is not looked at."""

    def read(self, held: Held, query: Tensor, logits: Logits) -> tuple[Tensor, Tensor | None]:
        """Attend to what is stored; as ``Backend.decode``."""
        scaling, softcap, sinks = logits
        slab, how = held.slab, (scaling, softcap, self._watching, sinks)
        if held.bias is not None:
            if isinstance(slab, CodedSlab):
                raise RuntimeError("coded tokens and a bias by distance")
            return held.bias.decode(query, slab, held.progress.seen, scaling, self._watching)
        if isinstance(slab, CodedSlab):
            return self._backend.decode_coded(query, slab, *how)
        if held.latent is not None:
            return held.latent.decode(self._backend, query, slab, *how)
        return self._backend.decode(query, slab, *how)

    def finish(self, held: Held, new: StepInput, received: Tensor | None) -> None:
        """Note the query of a token that is stored, and the attention that tokens received."""
        self._note(held, new)
        self._count(held, new, received)

    def _attend(self, held: Held, new: StepInput) -> tuple[Tensor, Tensor | None]:
        """Store, note and attend; as ``Backend.decode``."""
        self.store(held, new)
        self._note(held, new)
        return self.read(held, new.query, new.logits)

    def _note(self, held: Held, new: StepInput) -> None:
        if held.queries is not None:
            held.queries.push(new.query, held.progress.seen, new.valid)

    def _count(self, held: Held, new: StepInput, received: Tensor | None) -> None:
        slab, progress = held.slab, held.progress
        if received is not None:
            group = new.query.shape[1] // slab.kv_heads
            observe_step(self._policy, slab, received, group, progress.seen, new.valid)
        progress.note(new.valid)


class EagerStep(Step):
    """Reads lengths and positions where they are: on the host while sequences are alike."""

    def store(self, held: Held, new: StepInput) -> None:
        """Store the new token where the host says."""
        held.slab.append(new.key, new.value, held.progress.seen, new.valid)


class FixedStep(Step):
    """Reads nothing that the host knows, so that a captured step may be replayed.

    Lengths, offsets and positions are on the device, where they stay at one address, and so do
    keys, values, queries and the policy's state.
    """

    def store(self, held: Held, new: StepInput) -> None:
        """Store the new token where the device says."""
        seen = held.progress.spread(held.slab.batch, new.key.device)
        held.slab.store(new.key, new.value, seen, new.valid)

    def _attend(self, held: Held, new: StepInput) -> tuple[Tensor, Tensor | None]:
        slab = held.slab
        seen = held.progress.spread(slab.batch, new.key.device)
        if new.valid is None and held.latent is None and held.bias is None:
            ring = None if held.queries is None else held.queries.ring
            token = (new.query, new.key, new.value, seen)
            scaling, softcap, sinks = new.logits
            how = (ring, scaling, softcap, self._watching)
            result = (
                self._ops.step_coded(*token, slab, *how, sinks=sinks)
                if isinstance(slab, CodedSlab)
                else self._ops.step(*token, slab, *how, sinks=sinks)
            )
            if result is not None:
                return result
        return super()._attend(held, new)
