"""Measure a checkpoint on the task ``chain``: ``python -m tools.boxed.evaluate FOLDER``.

Every problem is solved by greedy ``generate`` with the full cache; problems of one difficulty
have one length, so that a batch needs no padding.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reasonalloc.evaluation.batch import FULL, Job, Settings
from reasonalloc.evaluation.chunks import Chunk, Item, ModelSpec
from reasonalloc.evaluation.sampling import Sampling
from reasonalloc.evaluation.solver import Solver
from reasonalloc.evaluation.tasks.chain import (
    DIFFICULTIES,
    ChainProblem,
    Split,
    grade,
    problems,
)
from reasonalloc.loading import load_model

#: Tokens that a completion may be longer than the exact chain, end tokens included.
SPARE_TOKENS = 16


@dataclass(frozen=True)
class LevelResult:
    """Exact counts of one difficulty."""

    variables: int
    problems: int
    correct: int
    exact_chains: int
    seconds: float


def evaluate(
    folder: Path,
    levels: Sequence[int],
    count: int,
    batch: int = 25,
    split: Split = "test",
    device: str = "cpu",
) -> list[LevelResult]:
    """Generate ``count`` completions at each difficulty and grade them."""
    loaded = load_model(str(folder), "float32", device)
    results: list[LevelResult] = []
    for variables in levels:
        began = time.monotonic()
        todo = list(problems(count, variables, split))
        texts = [
            text
            for start in range(0, count, batch)
            for text in _complete(folder, loaded, todo[start : start + batch])
        ]
        pairs = list(zip(todo, texts, strict=True))
        correct = sum(grade(problem.prompt, text).correct for problem, text in pairs)
        exact = sum(text.split() == problem.solution.split() for problem, text in pairs)
        seconds = round(time.monotonic() - began, 1)
        results.append(LevelResult(variables, count, correct, exact, seconds))
        print(json.dumps(asdict(results[-1])), flush=True)
    return results


def _complete(folder: Path, loaded: tuple[Any, Any], todo: Sequence[ChainProblem]) -> list[str]:
    limit = max(problem.solution_tokens for problem in todo) + SPARE_TOKENS
    solver = Solver(ModelSpec(str(folder)), Settings(1, 1), Sampling(), limit, loaded)
    items = tuple(Item(str(problem.seed), problem.prompt, 0, 0) for problem in todo)
    rows = solver.solve(Chunk(Job(FULL), items), lambda _: True).rows or []
    return [row["completion"] for row in rows]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="tools.boxed.evaluate", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--levels", type=int, nargs="+", default=list(DIFFICULTIES))
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--split", default="test", choices=["train", "calibration", "test"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=None, help="write the counts as JSON")
    options = parser.parse_args(arguments)
    results = evaluate(
        options.folder,
        options.levels,
        options.count,
        options.batch,
        options.split,
        options.device,
    )
    if options.out is not None:
        rows = [asdict(item) for item in results]
        options.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
