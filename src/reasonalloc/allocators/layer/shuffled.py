from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from reasonalloc.allocators.layer.base import LAYER_ALLOCATORS, LayerQuery
from reasonalloc.allocators.layer.profile import FromProfile
from reasonalloc.errors import UsageError


@LAYER_ALLOCATORS.register("shuffled", source="ours: the wave's budgets on the wrong layers")
@dataclass(frozen=True)
class Shuffled(FromProfile):
    """The budgets of ``profile`` dealt out to layers at random: what is the wave's order worth?

    ``seed``: another one gives another order.
    """

    seed: int = 0
    called: ClassVar[str] = "shuffled"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"shuffled: seed={self.seed} must be between 0 and 2^63 - 1")

    def allocate(self, query: LayerQuery) -> list[int]:
        if len(set(query.heads)) > 1:
            raise UsageError(
                f"layers='shuffled' deals budgets out to other layers, and those of "
                f"{query.model_id!r} have {min(query.heads)} to {max(query.heads)} KV heads: use "
                "'profile'"
            )
        budgets = super().allocate(query)
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        order = torch.randperm(len(budgets), generator=generator, device="cpu").tolist()
        return [budgets[layer] for layer in order]
