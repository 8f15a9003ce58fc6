from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from reasonalloc.evaluation.tasks.aime import Aime
from reasonalloc.evaluation.tasks.base import TASKS, Hub


@TASKS.register("aime24", source="HuggingFaceH4/aime_2024")
@dataclass(frozen=True)
class Aime24(Aime):
    """The 30 problems of AIME I and II 2024, answers from 0 to 999."""

    hub: ClassVar[Hub | None] = Hub("HuggingFaceH4/aime_2024", "train")
