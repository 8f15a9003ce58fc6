"""A tiny random model with the boxed reasoner's tokenizer, and results that nobody measured."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

import made_costs
from tools.boxed.model import build_config, build_model, save_checkpoint
from reasonalloc.calibrated.demand import Profile, config_hash
from reasonalloc.evaluation.arms import ArmResult
from reasonalloc.evaluation.batch import Job
from reasonalloc.evaluation.tasks.chain import problems

VARIABLES, BUDGET, INTERVAL, WINDOW = 2, 24, 16, 4
PROBLEMS = list(problems(3, VARIABLES))


def save_tiny(path: Path) -> Path:
    """Write the model (2 layers, 4 KV heads), its tokenizer and its profiles."""
    save_checkpoint(build_model(build_config(hidden=32, layers=2, head_dim=8, inner=32), 0), path)
    found = config_hash(AutoConfig.from_pretrained(path).to_dict())
    profile = Profile("tiny", found, 0.93, 8, ["x"], [30.0, 10.0], [40.0, 12.0], [[30.0, 10.0]])
    profile.save(path / "profile.json")
    made_costs.make(2, 4, fingerprint=found).save(path / "costs.json")
    return path


def made_up(
    arm: str, budget: int | None, correct: int, n: int = 10, compressions: int = 9
) -> ArmResult:
    right = tuple(i < correct for i in range(n))
    return ArmResult(
        Job(arm, budget), right, ((1,),) * n, ((1, 2),) * n, 1000, 2.0, 0.5, compressions
    )
