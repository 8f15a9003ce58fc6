"""What the years of the AIME share."""

from __future__ import annotations

import re
from typing import Any

from reasonalloc.errors import UsageError
from reasonalloc.evaluation.tasks.base import BOXED, Problem, text_field
from reasonalloc.evaluation.tasks.boxed_math import BoxedMath

#: One answer of ``math-ai/aime25`` is ``336^\circ``.
_ANSWER = re.compile(r"\d{1,3}(\^\{?\\circ\}?)?")


class Aime(BoxedMath):
    """American Invitational Mathematics Examination."""

    def problem(self, row: dict[str, Any], index: int) -> Problem:
        """Fields ``problem`` (or ``question``), ``answer``, and ``id`` if there is one.

        Raises:
            UsageError: as in ``Task``, or an answer that AIME cannot have.
        """
        name = text_field(row, "id") if row.get("id") is not None else str(index)
        text = text_field(row, "problem", "question")
        gold = text_field(row, "answer")
        if not _ANSWER.fullmatch(gold):
            raise UsageError(f"its answer {gold[:40]!r} is no whole number from 0 to 999")
        return Problem(name, f"{text}\n\n{BOXED}", gold)
