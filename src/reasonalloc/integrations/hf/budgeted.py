"""A model under a budget, as the checks of its calls see it."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from reasonalloc.config import CompressionConfig
from reasonalloc.integrations.hf.cache import BudgetCache, Owner
from reasonalloc.planning.memory import LayerShape


class Budgeted(Owner, Protocol):
    """What ``Attachment`` offers to calls, chats and the checks of ``generate``."""

    @property
    def config(self) -> CompressionConfig:
        """The settings."""
        ...

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        """All layers."""
        ...

    @property
    def totals(self) -> tuple[int, ...]:
        """Retained tokens per layer under a budget, all its KV heads together."""
        ...

    def totals_at(self, budget: int) -> tuple[int, ...]:
        """``totals`` as they would be under another budget."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        ...

    @property
    def implementation(self) -> str:
        """The attention that the model's configuration names now."""
        ...

    def new_cache(self) -> BudgetCache:
        """An empty cache."""
        ...

    def check_own(self, cache: BudgetCache) -> None:
        """Refuse a cache of another attachment."""
        ...

    def prefill(self, ids: torch.Tensor, cache: BudgetCache) -> None:
        """Read tokens [batch, n] into a cache."""
        ...

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate`` on a compressed cache."""
        ...
