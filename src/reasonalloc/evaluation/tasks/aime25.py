from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from reasonalloc.evaluation.tasks.aime import Aime
from reasonalloc.evaluation.tasks.base import TASKS, Hub


@TASKS.register("aime25", source="math-ai/aime25")
@dataclass(frozen=True)
class Aime25(Aime):
    """The 30 problems of AIME I and II 2025, answers from 0 to 999."""

    hub: ClassVar[Hub | None] = Hub("math-ai/aime25", "test")
