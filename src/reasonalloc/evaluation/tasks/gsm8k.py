from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from reasonalloc.errors import UsageError
from reasonalloc.evaluation.tasks.base import BOXED, TASKS, Hub, Problem, text_field
from reasonalloc.evaluation.tasks.boxed_math import BoxedMath

_NUMBER = re.compile(r"-?\d+(\.\d+)?")


@TASKS.register("gsm8k", source="openai/gsm8k, test; Cobbe et al. 2021")
@dataclass(frozen=True)
class Gsm8k(BoxedMath):
    """1,319 word problems of grade school, answers are whole numbers."""

    hub: ClassVar[Hub | None] = Hub("openai/gsm8k", "test", "main")

    def problem(self, row: dict[str, Any], index: int) -> Problem:
        _, mark, gold = text_field(row, "answer").rpartition("####")
        gold = gold.strip().replace(",", "")
        if not mark or not _NUMBER.fullmatch(gold):
            raise UsageError("its answer has no '####' with the number behind it")
        return Problem(str(index), f"{text_field(row, 'question')}\n\n{BOXED}", gold)
