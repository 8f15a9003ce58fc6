"""A tiny random model with the boxed reasoner's tokenizer, and results that nobody measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.boxed.model import build_config, build_model, save_checkpoint
from transformers import AutoConfig

import made_costs
from reasonalloc.calibrated.demand import DemandProfile, config_hash
from reasonalloc.evaluation.batch import Job, Settings, Watch
from reasonalloc.evaluation.chunks import Chunk, Item, ModelSpec
from reasonalloc.evaluation.demo import Recording, longest
from reasonalloc.evaluation.sampling import Sampling
from reasonalloc.evaluation.solver import Solver
from reasonalloc.evaluation.tasks.chain import ChainProblem, grade, problems

VARIABLES, BUDGET, INTERVAL, WINDOW = 2, 24, 16, 4
PROBLEMS = list(problems(3, VARIABLES))


def save_tiny(path: Path) -> Path:
    """Write the model (2 layers, 4 KV heads), its tokenizer and its profiles."""
    save_checkpoint(build_model(build_config(hidden=32, layers=2, head_dim=8, inner=32), 0), path)
    fingerprint = config_hash(AutoConfig.from_pretrained(path).to_dict())
    curve = [30.0, 10.0]
    profile = DemandProfile("tiny", fingerprint, 0.93, 8, ["x"], curve, [40.0, 12.0], [curve])
    profile.save(path / "profile.json")
    made_costs.make(2, 4, fingerprint=fingerprint).save(path / "costs.json")
    return path


@dataclass(frozen=True)
class Ran(Recording):
    """A batch, what it took, and bytes of one sequence."""

    kv_bytes: int = 0
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    compressions: int = 0


def run_job(
    model: Any,
    tokenizer: Any,
    todo: Sequence[ChainProblem],
    job: Job,
    settings: Settings,
    watch: Watch = lambda _: True,
) -> Ran:
    """Solve problems in one batch, greedily."""
    loaded = (model, tokenizer)
    solver = Solver(ModelSpec("tiny"), settings, Sampling(), longest(todo), loaded)
    items = tuple(Item(str(problem.seed), problem.prompt, 0, 0) for problem in todo)
    prompts, result = solver.complete(Chunk(job, items), watch, settings.record)
    texts = tokenizer.batch_decode(result.completions, skip_special_tokens=True)
    pairs = zip(todo, texts, strict=True)
    return Ran(
        job,
        tuple(grade(problem.prompt, text).correct for problem, text in pairs),
        tuple(map(tuple, prompts)),
        result.completions,
        result.events,
        result.kv_bytes // len(todo),
        result.seconds,
        result.prefill_seconds,
        result.compressions,
    )


def made_up(
    arm: str, budget: int | None, correct: int, n: int = 10, compressions: int = 9
) -> list[dict[str, Any]]:
    """Samples of one arm, two tokens each."""
    return [
        {
            "arm": arm,
            "budget": budget,
            "problem": str(i),
            "sample": 0,
            "correct": i < correct,
            "completion_tokens": 2,
            "kv_bytes": 1000,
            "compressions": compressions,
            "seconds": 2.0,
            "batch": n,
        }
        for i in range(n)
    ]
