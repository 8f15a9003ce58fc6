from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from reasonalloc.evaluation.tasks.base import BOXED, TASKS, Hub, Problem, text_field
from reasonalloc.evaluation.tasks.boxed_math import BoxedMath


@TASKS.register("math500", source="HuggingFaceH4/MATH-500; Lightman et al. 2023")
@dataclass(frozen=True)
class Math500(BoxedMath):
    """500 problems of MATH (Hendrycks et al. 2021), answers in LaTeX."""

    hub: ClassVar[Hub | None] = Hub("HuggingFaceH4/MATH-500", "test")

    def problem(self, row: dict[str, Any], index: int) -> Problem:
        name = text_field(row, "unique_id") if row.get("unique_id") is not None else str(index)
        return Problem(name, f"{text_field(row, 'problem')}\n\n{BOXED}", text_field(row, "answer"))
