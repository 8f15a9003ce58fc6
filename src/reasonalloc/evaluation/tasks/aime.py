"""What the years of the AIME share."""

from __future__ import annotations

from typing import Any

from reasonalloc.evaluation.tasks.base import BOXED, Problem, text_field
from reasonalloc.evaluation.tasks.boxed_math import BoxedMath


class Aime(BoxedMath):
    """American Invitational Mathematics Examination."""

    def problem(self, row: dict[str, Any], index: int) -> Problem:
        """Fields ``problem`` (or ``question``), ``answer``, and ``id`` if there is one."""
        name = text_field(row, "id") if row.get("id") is not None else str(index)
        text = text_field(row, "problem", "question")
        return Problem(name, f"{text}\n\n{BOXED}", text_field(row, "answer"))
