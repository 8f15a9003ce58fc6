from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reasonalloc.errors import UsageError
from reasonalloc.evaluation.tasks.base import TASKS, Problem, Problems, Task, Verdict, data_hash
from reasonalloc.evaluation.tasks.chain import MAX_VARIABLES, MIN_VARIABLES, grade, problems

DEFAULT_PROBLEMS = 50
#: The first few stand for the generator.
HASHED_PROBLEMS = 8


@TASKS.register("chain", source="generated here, for the boxed reasoner")
@dataclass(frozen=True)
class Chain(Task):
    """Generated variable graphs whose solution looks things up far back; 50 unless limited."""

    variables: int = 12

    def __post_init__(self) -> None:
        if not MIN_VARIABLES <= self.variables <= MAX_VARIABLES:
            raise UsageError(
                f"task chain: variables={self.variables} must be from {MIN_VARIABLES} to "
                f"{MAX_VARIABLES}"
            )

    def problem(self, row: dict[str, Any], index: int) -> Problem:
        raise UsageError("its problems are generated")

    def load(self, data: str | None, limit: int | None) -> Problems:
        """The first ``limit`` problems of the test split, which has no end."""
        if data is not None:
            raise UsageError(f"data={data!r} has no effect with task chain: leave it out")
        count = DEFAULT_PROBLEMS if limit is None else limit
        generated = [
            Problem(f"chain-{self.variables}-{item.seed}", item.prompt, item.answer)
            for item in problems(max(count, HASHED_PROBLEMS), self.variables, "test")
        ]
        return Problems(tuple(generated[:count]), data_hash(generated[:HASHED_PROBLEMS]))

    def grade(self, problem: Problem, completion: str) -> Verdict:
        mark = grade(problem.prompt, completion)
        return Verdict(mark.found, mark.correct)
