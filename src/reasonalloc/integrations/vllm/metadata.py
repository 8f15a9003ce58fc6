"""What the attention of a step needs, of all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from reasonalloc.integrations.vllm.runs import Tracked
from reasonalloc.ops.native.paged import PagedLoop


@dataclass(frozen=True)
class Piece:
    """Tokens ``start`` to ``stop`` of the step: a piece of a prompt, after ``before`` tokens.

    ``row``: of the batch.
    """

    request: Tracked
    row: int
    start: int
    stop: int
    before: int


@dataclass
class BudgetMetadata:
    """What a step's attention needs, for all layers. ``L`` layers, ``N`` runs = requests x heads.

    Attributes:
        builder: the ``ProcessorBuilder`` that made this; owns the storage.
        tokens: new tokens.
        by_head: runs are ordered by head first (several tokens per request, or learned sinks) or
            by request first (one each, so that queries need not be moved).
        query_start: [N + 1] int32.
        lengths: [L, N] int32; table: [L, N, pages] int32.
        slots: [L, tokens * kv_heads] int64, where new tokens go.
        noted: tokens whose queries are remembered, their rows and places; None if none are.
        longest_query: most new tokens of a request.
        prompts: pieces of prompts whose attention the policy is to see.
        loop: our own, which attends; None: vLLM's kernel does.
        begun: number of this step in the loop.
    """

    builder: Any
    tokens: int
    by_head: bool
    query_start: Tensor
    lengths: Tensor
    table: Tensor
    slots: Tensor
    noted: tuple[Tensor, Tensor, Tensor] | None
    longest_query: int
    prompts: list[Piece]
    loop: PagedLoop | None = None
    begun: int = 0

    def __post_init__(self) -> None:
        self._schedules: dict[int, Any] = {}

    @property
    def parts(self) -> list[tuple[Tensor | None, BudgetMetadata]]:
        """All of the step, see ``SplitMetadata``."""
        return [(None, self)]

    def schedule(self, layer: int) -> Any:
        """The kernel's schedule of a layer; one for all while all layers hold the same."""
        key = 0 if self.builder.layers_alike else layer
        if key not in self._schedules:
            kernel = self.builder.kernel
            self._schedules[key] = kernel.schedule(self.query_start, self.lengths[layer])
        return self._schedules[key]


@dataclass
class SplitMetadata:
    """What a step's attention needs whose requests are not computed alike.

    Attributes:
        builder, prompts: see ``BudgetMetadata``.
        parts: tokens, [n] int64, and what their attention needs.
    """

    builder: Any
    prompts: list[Piece]
    parts: list[tuple[Tensor | None, BudgetMetadata]]
