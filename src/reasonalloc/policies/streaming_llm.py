from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.errors import UsageError
from reasonalloc.policies.base import POLICIES, Candidates, Policy


@POLICIES.register("streaming_llm", source="StreamingLLM, arXiv 2309.17453")
@dataclass(frozen=True)
class StreamingLLM(Policy):
    """The first ``sinks`` tokens of the sequence and the most recent ones."""

    sinks: int = 4

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise UsageError(f"streaming_llm: sinks={self.sinks} must not be negative")

    def score(self, candidates: Candidates) -> Tensor:
        positions = candidates.positions
        age = (positions - candidates.seen[:, None, None]).float()  # exact, however long the text
        return torch.where(positions < self.sinks, torch.inf, age)
