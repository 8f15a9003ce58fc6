"""What tasks with a ``\\boxed{}`` answer share."""

from __future__ import annotations

from typing import ClassVar

from reasonalloc.evaluation.grading import last_box, math_grader
from reasonalloc.evaluation.tasks.base import Problem, Task, Verdict


class BoxedMath(Task):
    """A mathematical problem whose answer is the content of the last box, marked by math-verify."""

    needs_math: ClassVar[bool] = True

    def grade(self, problem: Problem, completion: str) -> Verdict:
        """Mark the last box; without one there is no answer."""
        answer = last_box(completion)
        if answer is None:
            return Verdict(None, False)
        return Verdict(answer, math_grader().equal(problem.gold, answer))
