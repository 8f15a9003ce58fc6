"""Accuracy of arms on a task, from Python: ``evaluate``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from reasonalloc.config import Arm, PinOverflow, Prompt, Step
from reasonalloc.errors import UsageError
from reasonalloc.evaluation import checks
from reasonalloc.evaluation.arm_files import (
    File,
    as_settings,
    choose_files,
    list_files,
    tell_shipped,
)
from reasonalloc.evaluation.arms import check_decoding, list_budgets, read_arms
from reasonalloc.evaluation.batch import Job, Settings
from reasonalloc.evaluation.chunks import Facts, ModelSpec
from reasonalloc.evaluation.engines import make_solver
from reasonalloc.evaluation.evaluation_result import EvaluationResult, Interrupted
from reasonalloc.evaluation.folder import RunFolder
from reasonalloc.evaluation.loaded import architecture, find_model
from reasonalloc.evaluation.manifest import manifest
from reasonalloc.evaluation.progress import Observer, make_observer
from reasonalloc.evaluation.protocols import find_rules
from reasonalloc.evaluation.runner import Executor, InProcess, make_jobs, run
from reasonalloc.evaluation.sharded import Leader, first_rank, follow
from reasonalloc.evaluation.spec import EvaluationSpec
from reasonalloc.evaluation.tasks.base import TASKS, Task
from reasonalloc.files import as_path
from reasonalloc.whole import whole_number

#: Makes what completes chunks, and says what the model is; what it opens ends with the stack.
OpenExecutor = Callable[[EvaluationSpec, Observer, ExitStack], tuple[Executor, Facts]]


def evaluate(
    model: Any,
    task: str | Task,
    *,
    arms: str | Arm | Iterable[str | Arm] = ("full", "rkv"),
    budgets: int | str | Iterable[int | str] = (1024,),
    out: File | None = None,
    tokenizer: Any = None,
    data: str | None = None,
    limit: int | None = None,
    protocol: str = "paper",
    samples: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    seed: int = 0,
    profile: File | Sequence[File] | None = None,
    interval: int = 128,
    window: int = 8,
    n_sink: int = 0,
    prompt: Prompt = "evict",
    pin_limit: int | None = None,
    pin_overflow: PinOverflow = "refuse",
    protect_prompt: bool = False,
    kv_dtype: str = "auto",
    attention: str = "auto",
    step: Step = "eager",
    batch_size: int = 8,
    engine: str = "transformers",
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    tp_plan: str | None = None,
    trust_remote_code: bool = False,
    workers: int = 1,
    ray_address: str | None = None,
    progress: Observer | bool | None = None,
) -> EvaluationResult:
    """Measure the accuracy of arms on a task, as ``reasonalloc eval`` does.

    Args:
        model: hub name, folder or ``.gguf`` file; or a loaded transformers model, which must not
            be attached to anything.
        task: ``"math500"``, ``"chain(variables=12)"`` (see ``reasonalloc ls``), or a ``Task``.
        arms: presets, ``"policy/layers/heads"`` or ``Arm`` objects; texts may hold several,
            separated by commas. ``"full"`` is the full cache.
        budgets: mean tokens kept per layer and KV head, or bytes of a sequence (``"64MiB"``,
            ``"25%@8192"``), each arm at each; texts may hold several, separated by commas.
        out: a folder for the results. The same call, or the command, goes on with what is in it.
            None: a temporary folder, which is removed.
        tokenizer: of a loaded model.
        data: JSON lines with problems instead of the task's own data.
        limit: only the first so many problems.
        protocol: ``paper`` (temperature 0.6, top-p 0.95, 8 samples, 16384 tokens), ``greedy`` (1
            sample, 16384 tokens) or ``quick`` (greedy, 1024 tokens); the next five replace parts.
        samples: per problem.
        max_new_tokens: bound of a sample's tokens.
        temperature: 0 is greedy.
        top_p: share of probability that is sampled from.
        top_k: number of most likely tokens that are sampled from; 0: all.
        seed: of all samples.
        profile: calibrated files for the arms that read one, of different kinds.
        interval: generated tokens between two compressions.
        window: most recent tokens that are always kept.
        n_sink: first tokens that are always kept.
        prompt: ``evict``: it competes; ``protect``: it stays, inside the budget; ``pin``: it stays
            on top of the budget.
        pin_limit, pin_overflow: longest prompt that is pinned; what happens to longer ones.
        protect_prompt: another name of ``prompt="protect"``.
        kv_dtype: older keys and values in fewer bits, see ``CompressionConfig``.
        attention, step: backend, and how decode steps run; see ``CompressionConfig``.
        batch_size: samples that are generated together.
        engine: ``transformers``, or ``vllm``: one engine per arm and budget.
        dtype, device, trust_remote_code: how a model is loaded by its name.
        device_map, tp_plan: passed to ``from_pretrained``; ``tp_plan`` needs a ``torchrun``, whose
            first process has the result (the others' are empty).
        workers, ray_address: several models at once with Ray, here or on a running cluster.
        progress: None or True: a bar of tqdm; False: nothing; or an ``Observer``.

    Returns:
        The samples, with ``summary``, ``table()``, ``to_pandas()`` and ``plot()``.

    Raises:
        UsageError: anything that cannot be run, before it runs; names the field and a remedy.
        UnsupportedError: a model that cannot work under a budget.
        Interrupted: Ctrl-C (a ``KeyboardInterrupt``); its ``result`` has what was finished.
    """
    name, kind = find_task(task)
    rules = find_rules(protocol, samples, max_new_tokens, temperature, top_p, top_k)
    check_decoding(step, attention)
    names = read_arms(arms)
    workers = whole_number("workers", workers, 1)
    options = ModelSpec("", dtype, device, trust_remote_code, device_map, tp_plan, engine)
    source, loaded = find_model(model, tokenizer, options, workers, ray_address)
    if loaded is not None and tokenizer is None:
        raise UsageError("a loaded model needs its tokenizer: add tokenizer=")
    files = choose_files(names, list_files(profile), partial(architecture, source, loaded))
    settings = Settings(
        interval=interval,
        window=window,
        n_sink=n_sink,
        prompt=prompt,
        pin_limit=pin_limit,
        pin_overflow=pin_overflow,
        protect_prompt=protect_prompt,
        kv_dtype=kv_dtype,
        seed=seed,
        attention=attention,
        step=step,
        **as_settings(files),
    )
    jobs = _jobs(names, list_budgets(budgets), settings)
    batch_size = whole_number("batch_size", batch_size, 1)
    limit = None if limit is None else whole_number("limit", limit, 1)
    if kind.needs_math:
        from reasonalloc.evaluation.grading import require_math

        require_math()
    spec = EvaluationSpec(
        task=name,
        kind=kind,
        problems=kind.load(data, limit),
        jobs=jobs,
        rules=rules,
        protocol=protocol,
        model=source,
        settings=settings,
        files=files,
        batch=batch_size,
        workers=workers,
        ray_address=ray_address,
        loaded=loaded,
    )
    checks.check_engine(spec.model, settings)
    checks.check_parts(spec.model, settings, spec.remote)
    observer = make_observer(progress)
    tell_shipped(files, observer.note)
    return take_samples(spec, None if out is None else as_path("out", out), observer)


def find_task(task: str | Task) -> tuple[str, Task]:
    """Return a task and its name.

    Raises:
        UsageError: an unknown name or parameter.
    """
    if isinstance(task, Task):
        return TASKS.specification(task), task
    return task, TASKS.create(task)


def _jobs(names: list[str], budgets: Sequence[int | str], settings: Settings) -> list[Job]:
    jobs = make_jobs(names, budgets)
    for job in jobs:
        if job.budget is not None:
            settings.config(job)  # refuses a budget that cannot be
    return jobs


def open_executor(
    spec: EvaluationSpec, observer: Observer, stack: ExitStack
) -> tuple[Executor, Facts]:
    """Load the model here, or in Ray's workers; see ``OpenExecutor``.

    Raises:
        UsageError, UnsupportedError: see ``Solver.check``.
    """
    if spec.remote:
        from reasonalloc.evaluation.cluster import Cluster

        cluster = Cluster(spec.solver_arguments, spec.workers, spec.ray_address, observer)
        stack.enter_context(cluster)
        return cluster, cluster.check(spec.jobs, spec.prompts)
    solver = make_solver(*spec.solver_arguments, spec.loaded)
    stack.callback(solver.close)
    executor = Leader if spec.model.tp_plan else InProcess
    return executor(solver, observer), solver.check(spec.jobs, spec.prompts)


def take_samples(
    spec: EvaluationSpec,
    out: Path | None,
    observer: Observer,
    opened: OpenExecutor = open_executor,
) -> EvaluationResult:
    """Take all samples that are not in ``out`` yet, and return those that were asked for.

    Raises:
        UsageError, UnsupportedError, Interrupted: see ``evaluate``.
    """
    if spec.model.tp_plan is not None and not first_rank():
        solver = make_solver(*spec.solver_arguments)
        solver.check(spec.jobs, spec.prompts)
        follow(solver)
        return _result(spec, Path(), [])
    with ExitStack() as stack:
        kept = out is not None
        temporary = "" if kept else stack.enter_context(tempfile.TemporaryDirectory())
        path = (out or Path(temporary)).expanduser()
        folder = stack.enter_context(RunFolder(path))
        with observer.busy("Loading the model"):
            executor, facts = opened(spec, observer, stack)
        checks.check_length(facts, spec.rules.max_new_tokens)
        if facts.template_hash is None:
            observer.note("this model has no chat template: problems are given as plain text")
        folder.open(manifest(spec, facts))
        try:
            _go_on(spec, folder, executor, observer)
        except KeyboardInterrupt:
            folder.read_again()
            result = _finish(spec, folder, kept)
            if kept:
                observer.note(
                    f"interrupted: {len(result.taken)} of {spec.total} samples are in "
                    f"{str(path)!r}; the same command goes on from there"
                )
            raise Interrupted(result) from None
        _say_given_up(spec.kind, observer)
        return _finish(spec, folder, kept)


def _go_on(spec: EvaluationSpec, folder: RunFolder, executor: Executor, observer: Observer) -> None:
    chunks = spec.chunks(folder.done())
    left = sum(len(chunk.items) for chunk in chunks)
    if left < spec.total:
        observer.note(
            f"{spec.total - left} of {spec.total} samples are in {str(folder.path)!r} already"
        )
    with observer.started(left, spec.rules.max_new_tokens):
        run(spec.task, spec.kind, spec.problems.chosen, chunks, folder, executor, observer)


def _finish(spec: EvaluationSpec, folder: RunFolder, kept: bool) -> EvaluationResult:
    """The samples of a folder; all their fields are read now if the folder is not kept."""
    result = _result(spec, folder.path, folder.rows)
    if not kept:
        _ = result.rows
    return result


def _result(spec: EvaluationSpec, folder: Path, rows: Sequence[dict[str, Any]]) -> EvaluationResult:
    problems = tuple(problem.id for problem in spec.problems.chosen)
    wanted, jobs = set(problems), {(job.arm, job.budget) for job in spec.jobs}
    samples = spec.rules.samples
    taken = tuple(
        row
        for row in rows
        if row["problem"] in wanted
        and row["sample"] < samples
        and (row["arm"], row["budget"]) in jobs
    )
    bound = spec.rules.max_new_tokens
    return EvaluationResult(spec.task, problems, tuple(spec.jobs), samples, folder, taken, bound)


def _say_given_up(kind: Task, observer: Observer) -> None:
    if not kind.needs_math:
        return
    from reasonalloc.evaluation.grading import math_grader

    if count := math_grader().given_up:
        observer.note(f"{count} answers could not be compared in time and count as wrong")
