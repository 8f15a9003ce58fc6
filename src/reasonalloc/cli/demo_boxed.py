"""The demo on the boxed reasoner: accuracy, bytes and speed of every arm at several budgets."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import typer

from reasonalloc.cli import output
from reasonalloc.cli.demo_watch import Board
from reasonalloc.config import RecordLevel
from reasonalloc.errors import CompressionNeverHappened, UsageError
from reasonalloc.evaluation.arms import SPARE_TOKENS, ArmResult, run_job
from reasonalloc.evaluation.batch import FULL, Job, Settings, Watch, check_jobs
from reasonalloc.evaluation.summary import summarise
from reasonalloc.evaluation.tasks.chain import ChainProblem, problems
from reasonalloc.evaluation.workers import Runner, idle_cores, run_jobs
from reasonalloc.report.page import check_writable, render, require_report, write

DEFAULT_PAGE = "reasonalloc-demo.html"
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
#: Tokens of the measurement: longer than an interval, so that it compresses.
_PROBE_STEPS = 40


@dataclass(frozen=True)
class Plan:
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


def demo(
    as_json: bool = False,
    out: str = DEFAULT_PAGE,
    count: int | None = None,
    folder: Path | None = None,
) -> None:
    """Run every arm, print the table, write the page.

    Args:
        as_json: one JSON object on stdout instead of the table.
        out: file of the page.
        count: problems per arm and budget; None: as many as fit into the time.
        folder: another checkpoint of the boxed model.
    """
    began = time.monotonic()
    require_report()
    target = check_writable(out)
    if count is not None and count < 1:
        raise UsageError(f"--problems {count}: give at least 1")
    plan = make_plan(folder or boxed_folder(), count or MOST)
    if plan.left_out:
        output.note(plan.left_out)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", CompressionNeverHappened)  # the table says it
        board = stack.enter_context(Board())
        workers = _load(plan, board)
        check_jobs(workers[0][0], plan.jobs, plan.settings)
        if count is None:
            plan = _fit(plan, workers, board)
        longest = max(p.solution_tokens for p in plan.problems()) + SPARE_TOKENS
        board.start(len(plan.jobs), longest, f"{plan.count} problems per arm and budget")
        until = began + LIMIT if count is None else None
        results, interrupted = run_jobs(plan.jobs, _runners(plan, workers), board, until)
    if not results:
        raise KeyboardInterrupt
    seconds = time.monotonic() - began
    _report(plan, results, workers[0][1], target, as_json, interrupted, seconds)
    if len(results) < len(plan.jobs):
        why = "interrupted" if interrupted else "the time was up"
        done = f"{len(results)} of {len(plan.jobs)} runs were finished"
        output.note(f"{why}: {done}; they are in the table and on the page")
    if interrupted:
        raise typer.Exit(130)


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


def make_plan(folder: Path, count: int) -> Plan:
    """All arms that can run with this checkpoint."""
    needed = {arm: folder / _FILES[arm] for arm in ARMS if arm in _FILES}
    absent = {arm: path for arm, path in needed.items() if not path.is_file()}
    arms = tuple(arm for arm in ARMS if arm not in absent)
    left_out = None
    if absent:
        files = ", ".join(str(path) for path in absent.values())
        left_out = f"{', '.join(absent)} left out: beside the model there is no {files}"
    profile, costs = (None if arm in absent else needed[arm] for arm in ("reasonalloc", "best"))
    return Plan(folder, arms, BUDGETS, count, VARIABLES, profile, costs, left_out, WORKERS)


def _load(plan: Plan, board: Board) -> list[tuple[Any, Any]]:
    """One model for each worker: an attached model serves one run at a time."""
    from reasonalloc.loading import load_model

    board.say("Load the boxed model")
    count = idle_cores(plan.workers)
    return [load_model(str(plan.folder), "float32", "cpu") for _ in range(count)]


def _runners(plan: Plan, workers: Sequence[tuple[Any, Any]]) -> list[Runner]:
    todo = plan.problems()

    def runner(model: Any, tokenizer: Any) -> Runner:
        def run(job: Job, watch: Watch) -> ArmResult:
            record: RecordLevel = "tokens" if job.budget == plan.traced else "off"
            settings = replace(plan.settings, record=record)
            return run_job(model, tokenizer, todo, job, settings, watch)

        return run

    return [runner(*worker) for worker in workers]


def _fit(plan: Plan, workers: Sequence[tuple[Any, Any]], board: Board) -> Plan:
    """As many problems as fit into the time; fewer budgets where even the least do not."""
    board.say("Measure the speed of this machine")
    # The first call of each worker sets things up, and is not counted.
    _, least, most = (_job_seconds(plan, workers, count) for count in (LEAST, LEAST, MOST))
    each = max(0.0, (most - least) / (MOST - LEAST))
    fits = 0
    for budgets in (BUDGETS, FEWER_BUDGETS):
        plan = replace(plan, budgets=budgets)
        room = SECONDS * len(workers) / len(plan.jobs)  # for one job
        fits = MOST if room >= most else LEAST + math.floor((room - least) / each)
        if fits >= LEAST:
            break
    if plan.budgets != BUDGETS:
        output.note("this machine is slow or busy: fewer budgets are run")
    if fits < LEAST:
        output.note(f"even so it may take more than three minutes with {LEAST} problems")
    return replace(plan, count=min(max(fits, LEAST), MOST))


def _job_seconds(plan: Plan, workers: Sequence[tuple[Any, Any]], count: int) -> float:
    """Expected seconds of a job with so many problems while every worker is busy."""
    todo = plan.problems(count)
    settings = replace(plan.settings, max_new_tokens=_PROBE_STEPS)

    def runner(model: Any, tokenizer: Any) -> Runner:
        return lambda job, watch: run_job(model, tokenizer, todo, job, settings, watch)

    jobs = [Job("rkv", plan.traced)] * len(workers)
    results, interrupted = run_jobs(jobs, [runner(*w) for w in workers], Board.silent())
    if interrupted:
        raise KeyboardInterrupt
    steps = max(problem.solution_tokens for problem in todo) + SPARE_TOKENS
    return max(
        r.prefill_seconds + steps * (r.seconds - r.prefill_seconds) / (_PROBE_STEPS - 1)
        for r in results
    )


def _report(
    plan: Plan,
    results: list[ArmResult],
    tokenizer: Any,
    target: Path,
    as_json: bool,
    interrupted: bool,
    seconds: float,
) -> None:
    from reasonalloc.cli.demo_page import page_data
    from reasonalloc.cli.demo_table import print_table, report_data

    rows = summarise(results)
    write(target, render(page_data(plan, results, rows, tokenizer)))
    if as_json:
        output.print_json(report_data(plan, rows, target, interrupted, seconds))
    else:
        print_table(plan, rows, target, seconds)
