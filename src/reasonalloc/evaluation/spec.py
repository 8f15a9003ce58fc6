"""Everything that decides the samples of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reasonalloc.evaluation.batch import Job, Settings
from reasonalloc.evaluation.chunks import Chunk, ModelSpec
from reasonalloc.evaluation.folder import Key
from reasonalloc.evaluation.protocols import Rules
from reasonalloc.evaluation.runner import plan_chunks
from reasonalloc.evaluation.sampling import Sampling
from reasonalloc.evaluation.tasks.base import Problems, Task


@dataclass(frozen=True)
class EvaluationSpec:
    """What an evaluation is asked to do, checked as far as it can be without the model.

    Attributes:
        task, kind: the task's name and the task.
        problems: those that were asked for.
        jobs: arms at their budgets, in the order of the results.
        rules, protocol: how samples are taken, and the name of it.
        model: what is loaded.
        settings: of the cache.
        files: calibrated files by their kind.
        batch: samples that are generated together, at most.
        workers, ray_address: see ``evaluate``.
        loaded: a model and its tokenizer, if they are not loaded by name.
    """

    task: str
    kind: Task
    problems: Problems
    jobs: list[Job]
    rules: Rules
    protocol: str
    model: ModelSpec
    settings: Settings
    files: dict[str, str]
    batch: int
    workers: int = 1
    ray_address: str | None = None
    loaded: tuple[Any, Any] | None = None

    @property
    def remote(self) -> bool:
        """Whether Ray's workers complete the samples."""
        return self.workers > 1 or self.ray_address is not None

    @property
    def total(self) -> int:
        """Samples of all jobs."""
        return len(self.jobs) * len(self.problems.chosen) * self.rules.samples

    @property
    def prompts(self) -> list[str]:
        """Of all problems."""
        return [problem.prompt for problem in self.problems.chosen]

    @property
    def solver_arguments(self) -> tuple[ModelSpec, Settings, Sampling, int]:
        """The first arguments of ``make_solver``."""
        return self.model, self.settings, self.rules.sampling, self.rules.max_new_tokens

    def chunks(self, done: set[Key]) -> list[Chunk]:
        """Return what is left to do."""
        chosen, samples, seed = self.problems.chosen, self.rules.samples, self.settings.seed
        chunks = plan_chunks(self.jobs, chosen, samples, seed, self.batch, done)
        if self.model.engine == "vllm":  # an engine has one budget: job after job
            chunks.sort(key=lambda chunk: self.jobs.index(chunk.job))
        return chunks
