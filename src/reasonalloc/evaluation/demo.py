"""The demo: every arm at several budgets on the boxed reasoner, traced at one of them."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from reasonalloc.config import RecordLevel
from reasonalloc.core.recorder import Event
from reasonalloc.errors import CompressionNeverHappened, UsageError
from reasonalloc.evaluation.batch import FULL, BatchResult, Job, Settings, Watch
from reasonalloc.evaluation.chunks import Chunk, Facts, Item, ModelSpec, Outcome
from reasonalloc.evaluation.evaluate import take_samples
from reasonalloc.evaluation.evaluation_result import EvaluationResult, Interrupted
from reasonalloc.evaluation.progress import Observer
from reasonalloc.evaluation.protocols import find_rules
from reasonalloc.evaluation.runner import Executor
from reasonalloc.evaluation.solver import Solver
from reasonalloc.evaluation.spec import EvaluationSpec
from reasonalloc.evaluation.tasks.base import TASKS
from reasonalloc.evaluation.tasks.chain import ChainProblem, problems
from reasonalloc.evaluation.threads import Threads, idle_cores
from reasonalloc.loading import load_model, quiet

ARMS = (
    "best",
    "rkv",
    "snapkv",
    "h2o",
    "streaming_llm",
    "pyramid-rkv",
    "reasonalloc",
    "random",
)
_FILES = {"reasonalloc": "profile.json", "best": "costs.json"}
#: Tokens per layer and KV head. The first is recorded token by token: an early Ctrl-C then still
#: leaves something for every part of the page.
BUDGETS = (256, 192, 288, 320)
FEWER_BUDGETS = (256, 320)
VARIABLES, INTERVAL, WINDOW = 12, 32, 8
#: Time for all arms, so that loading, printing and the page stay within three minutes as well.
SECONDS = 80.0
#: If the machine turns out slower than it was measured to be, no run starts after this.
LIMIT = 160.0
LEAST, MOST = 10, 50
WORKERS = 2
#: Tokens that a completion may be longer than the exact chain, end tokens included.
SPARE_TOKENS = 16
#: Tokens of the measurement: longer than an interval, so that it compresses.
_PROBE_STEPS = 40


@dataclass(frozen=True)
class DemoPlan:
    """What is run.

    Attributes:
        folder: the checkpoint.
        arms: those that can run.
        budgets: tokens, the traced one first.
        count: problems per arm and budget.
        variables: difficulty of the problems.
        profile, costs: profiles of attention mass and of costs, or None.
        left_out: why an arm is missing, or None.
        workers: at most so many runs at a time, each on one core.
    """

    folder: Path
    arms: tuple[str, ...]
    budgets: tuple[int, ...]
    count: int
    variables: int
    profile: Path | None
    costs: Path | None
    left_out: str | None
    workers: int

    @property
    def jobs(self) -> list[Job]:
        """Full cache first, then budget by budget."""
        return [Job(FULL), *(Job(arm, budget) for budget in self.budgets for arm in self.arms)]

    @property
    def traced(self) -> int:
        """The budget whose runs are recorded token by token: the first to run."""
        return self.budgets[0]

    @property
    def settings(self) -> Settings:
        """Cadence and profiles of every arm."""
        return Settings(INTERVAL, WINDOW, self.profile, self.costs)

    def problems(self, count: int | None = None) -> list[ChainProblem]:
        """The first test problems; training and calibration draw from other generators."""
        return list(problems(count or self.count, self.variables, "test"))

    def spec(self) -> EvaluationSpec:
        """Return the same as an evaluation of the task ``chain``."""
        task = f"chain(variables={self.variables})"
        kind = TASKS.create(task)
        return EvaluationSpec(
            task=task,
            kind=kind,
            problems=kind.load(None, self.count),
            jobs=self.jobs,
            rules=find_rules("greedy", max_new_tokens=longest(self.problems())),
            protocol="greedy",
            model=ModelSpec(str(self.folder), "float32", "cpu"),
            settings=self.settings,
            files={},
            batch=self.count,
            workers=1,
        )


def longest(chosen: Sequence[ChainProblem]) -> int:
    """Bound of the tokens of these problems' completions."""
    return max(problem.solution_tokens for problem in chosen) + SPARE_TOKENS


def boxed_folder() -> Path:
    """The checkpoint that comes with the package.

    Raises:
        UsageError: it is not there.
    """
    folder = Path(str(files("reasonalloc"))) / "boxed" / "checkpoint"
    if not (folder / "model.safetensors").is_file():
        raise UsageError(
            f"the boxed model is missing from this installation ({str(folder)!r}): install "
            "reasonalloc again, or try 'reasonalloc demo --real'"
        )
    return folder


def make_plan(folder: Path, count: int) -> DemoPlan:
    """All arms that can run with this checkpoint."""
    needed = {arm: folder / _FILES[arm] for arm in ARMS if arm in _FILES}
    absent = {arm: path for arm, path in needed.items() if not path.is_file()}
    arms = tuple(arm for arm in ARMS if arm not in absent)
    left_out = None
    if absent:
        paths = ", ".join(str(path) for path in absent.values())
        left_out = f"{', '.join(absent)} left out: beside the model there is no {paths}"
    profile, costs = (None if arm in absent else needed[arm] for arm in ("reasonalloc", "best"))
    return DemoPlan(folder, arms, BUDGETS, count, VARIABLES, profile, costs, left_out, WORKERS)


@dataclass(frozen=True)
class Recording:
    """A batch that was recorded token by token.

    Attributes:
        job: arm and budget.
        correct: per problem, whether the answer is right.
        prompts: per problem, token ids of the prompt; all of one length.
        completions: per problem, generated token ids, up to the end token and with it.
        events: what the recorder kept.
    """

    job: Job
    correct: tuple[bool, ...]
    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]
    events: tuple[Event, ...]


class Recorder:
    """A solver that keeps what each batch did, and events token by token at one budget.

    Args:
        solver: completes the batches.
        traced: the budget; None: no events are kept.
    """

    def __init__(self, solver: Solver, traced: int | None = None) -> None:
        self._solver, self._traced = solver, traced
        self.batches: list[tuple[Chunk, list[list[int]], BatchResult]] = []

    def solve(self, chunk: Chunk, watch: Watch) -> Outcome:
        """See ``Completes``."""
        budget = chunk.job.budget
        level: RecordLevel = "tokens" if budget is not None and budget == self._traced else "off"
        prompts, result = self._solver.complete(chunk, watch, level)
        self.batches.append((chunk, prompts, result))
        return Outcome(self._solver.rows(chunk, prompts, result), [])


@dataclass(frozen=True)
class DemoRun:
    """What the demo did.

    Attributes:
        plan: as it was run.
        samples: rows of the ``EvaluationResult``.
        recordings: the traced runs, in the order of the jobs.
        tokenizer: the model's.
        interrupted: whether Ctrl-C ended it.
    """

    plan: DemoPlan
    samples: list[dict[str, Any]]
    recordings: list[Recording]
    tokenizer: Any
    interrupted: bool


def run_demo(plan: DemoPlan, observer: Observer, fit: bool, until: float | None) -> DemoRun:
    """Run every arm.

    Args:
        plan: what to run.
        observer: is told how it goes.
        fit: whether to choose the number of problems so that all arms take ``SECONDS``.
        until: ``time.monotonic()`` after which no run is started.

    Raises:
        UsageError: an arm that cannot run.
        KeyboardInterrupt: Ctrl-C before anything was finished.
    """
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionNeverHappened)  # the table says it
        with observer.busy("Load the boxed model"):
            models = load_models(plan)
        # An arm that cannot run is refused before the machine is measured.
        _solvers(plan, models[:1], 1)[0].check(plan.jobs, [""])
        if fit:
            with observer.busy("Measure the speed of this machine"):
                plan = _fit(plan, models, observer)
        spec = plan.spec()
        solvers = _solvers(plan, models, spec.rules.max_new_tokens)
        recorders = [Recorder(solver, plan.traced) for solver in solvers]

        def opened(*_: Any) -> tuple[Executor, Facts]:
            facts = solvers[0].check(spec.jobs, spec.prompts)
            return Threads(recorders, observer, until), facts

        try:
            result, interrupted = take_samples(spec, None, observer, opened), False
        except Interrupted as stopped:
            result, interrupted = stopped.result, True
    if not result.rows:
        raise KeyboardInterrupt
    recordings = _recordings(plan, recorders, result)
    return DemoRun(plan, result.rows, recordings, models[0][1], interrupted)


def load_models(plan: DemoPlan) -> list[tuple[Any, Any]]:
    """One model for each worker: an attached model serves one run at a time."""
    count = idle_cores(plan.workers)
    return [load_model(str(plan.folder), "float32", "cpu") for _ in range(count)]


def _solvers(
    plan: DemoPlan, models: Sequence[tuple[Any, Any]], max_new_tokens: int
) -> list[Solver]:
    spec, sampling = ModelSpec(str(plan.folder)), find_rules("greedy").sampling
    return [Solver(spec, plan.settings, sampling, max_new_tokens, loaded) for loaded in models]


def _recordings(
    plan: DemoPlan, recorders: Sequence[Recorder], result: EvaluationResult
) -> list[Recording]:
    """The traced runs, in the order of the jobs."""
    correct: dict[Job, tuple[bool, ...]] = {}
    for row in result.rows:
        job = Job(row["arm"], row["budget"])
        correct[job] = (*correct.get(job, ()), row["correct"])
    made = {
        chunk.job: Recording(
            chunk.job,
            correct[chunk.job],
            tuple(map(tuple, prompts)),
            batch.completions,
            batch.events,
        )
        for recorder in recorders
        for chunk, prompts, batch in recorder.batches
        if batch.events and chunk.job in correct
    }
    return [made[job] for job in plan.jobs if job in made]


def _fit(plan: DemoPlan, models: Sequence[tuple[Any, Any]], observer: Observer) -> DemoPlan:
    """As many problems as fit into the time; fewer budgets where even the least do not."""
    # The first call of each worker sets things up, and is not counted.
    _, least, most = (_job_seconds(plan, models, count) for count in (LEAST, LEAST, MOST))
    each = max(0.0, (most - least) / (MOST - LEAST))
    fits = 0
    for budgets in (BUDGETS, FEWER_BUDGETS):
        plan = replace(plan, budgets=budgets)
        room = SECONDS * len(models) / len(plan.jobs)  # for one job
        fits = MOST if room >= most else LEAST + math.floor((room - least) / each)
        if fits >= LEAST:
            break
    if plan.budgets != BUDGETS:
        observer.note("this machine is slow or busy: fewer budgets are run")
    if fits < LEAST:
        observer.note(f"even so it may take more than three minutes with {LEAST} problems")
    return replace(plan, count=min(max(fits, LEAST), MOST))


def _job_seconds(plan: DemoPlan, models: Sequence[tuple[Any, Any]], count: int) -> float:
    """Expected seconds of a job with so many problems while every worker is busy."""
    todo = plan.problems(count)
    items = tuple(Item(str(problem.seed), problem.prompt, 0, 0) for problem in todo)
    chunks = deque([Chunk(Job("rkv", plan.traced), items) for _ in models])
    recorders = [Recorder(solver) for solver in _solvers(plan, models, _PROBE_STEPS)]
    for _ in Threads(recorders, Observer()).outcomes(chunks):
        continue
    results = [batch for recorder in recorders for _, _, batch in recorder.batches]
    return max(
        r.prefill_seconds + longest(todo) * (r.seconds - r.prefill_seconds) / (_PROBE_STEPS - 1)
        for r in results
    )
