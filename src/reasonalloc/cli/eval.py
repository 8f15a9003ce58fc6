"""``reasonalloc eval``: arms on a benchmark, resumable, on one device or many."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from reasonalloc.cli import eval_checks as checks
from reasonalloc.cli import eval_options as e
from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.version import __version__

if TYPE_CHECKING:
    from reasonalloc.config import Step
    from reasonalloc.evaluation.batch import Job, Settings
    from reasonalloc.evaluation.folder import Key
    from reasonalloc.evaluation.protocols import Rules
    from reasonalloc.evaluation.solver import Chunk, Facts, ModelSpec
    from reasonalloc.evaluation.tasks.base import Problems, Task


def command(
    task: e.TaskName,
    out: e.Out,
    model: o.ModelArgument = None,
    model_option: o.ModelOption = None,
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    arms: e.Arms = "full,rkv",
    budgets: e.Budgets = "1024",
    data: e.Data = None,
    limit: e.Limit = None,
    protocol: e.ProtocolName = "paper",
    samples: e.Samples = None,
    max_new_tokens: e.MaxNewTokens = None,
    temperature: e.Temperature = None,
    top_p: e.TopP = None,
    top_k: e.TopK = None,
    seed: e.Seed = 0,
    interval: o.Interval = 128,
    window: o.Window = 8,
    n_sink: o.Sinks = 0,
    protect_prompt: o.ProtectPrompt = False,
    profile: e.Profiles = None,
    attention: e.Attention = "auto",
    step: e.StepKind = "eager",
    batch_size: e.BatchSize = 8,
    engine: e.Engine = "transformers",
    device: o.Device = "auto",
    device_map: e.DeviceMap = None,
    tp_plan: e.TpPlan = None,
    workers: e.Workers = 1,
    ray_address: e.RayAddress = None,
    as_json: o.Json = False,
) -> None:
    """Accuracy of arms on a benchmark. Started again, it goes on where it was.

    Protocols: paper (temperature 0.6, top-p 0.95, 8 samples, 16384 tokens), greedy (1 sample, 16384
    tokens) and quick (greedy, 1 sample, 1024 tokens).
    """
    name = o.pick_model(model, model_option)
    from reasonalloc.evaluation.protocols import find_rules
    from reasonalloc.evaluation.tasks.base import TASKS

    kind = TASKS.create(task)
    rules = find_rules(protocol, samples, max_new_tokens, temperature, top_p, top_k)
    common = {
        "interval": interval,
        "window": window,
        "n_sink": n_sink,
        "protect_prompt": protect_prompt,
    }
    o.check_decoding(step, attention)
    names = o.read_arms(arms)
    from reasonalloc.cli.eval_files import as_settings, choose_files
    from reasonalloc.evaluation.batch import Settings

    files = choose_files(names, profile or [])
    settings = Settings(
        seed=seed,
        attention=attention,
        step=cast("Step", step),
        **as_settings(files),
        **common,  # type: ignore[arg-type]
    )
    jobs = _jobs(names, budgets, settings)
    if kind.needs_math:
        from reasonalloc.evaluation.grading import require_math

        require_math()
    problems = kind.load(data, limit)
    from reasonalloc.evaluation.solver import ModelSpec

    spec = ModelSpec(name, dtype, device, trust_remote_code, device_map, tp_plan, engine)
    checks.check_engine(spec, settings)
    checks.check_parts(spec, settings, workers > 1 or ray_address is not None)
    plan = _Plan(
        task=task,
        kind=kind,
        problems=problems,
        jobs=jobs,
        rules=rules,
        protocol=protocol,
        spec=spec,
        settings=settings,
        files=files,
        batch=batch_size,
        workers=workers,
        ray_address=ray_address,
    )
    _run(plan, Path(out).expanduser(), as_json)


@dataclass(frozen=True)
class _Plan:
    task: str
    kind: Task
    problems: Problems
    jobs: list[Job]
    rules: Rules
    protocol: str
    spec: ModelSpec
    settings: Settings
    files: dict[str, str]
    batch: int
    workers: int
    ray_address: str | None

    @property
    def remote(self) -> bool:
        return self.workers > 1 or self.ray_address is not None

    def chunks(self, done: set[Key]) -> list[Chunk]:
        """What is left to do."""
        from reasonalloc.evaluation.runner import plan_chunks

        chosen, samples, seed = self.problems.chosen, self.rules.samples, self.settings.seed
        chunks = plan_chunks(self.jobs, chosen, samples, seed, self.batch, done)
        if self.spec.engine == "vllm":  # an engine has one budget: job after job
            chunks.sort(key=lambda chunk: self.jobs.index(chunk.job))
        return chunks

    def manifest(self, facts: Facts) -> dict[str, Any]:
        """What all samples of a folder share. Arms, budgets, samples and the limit may grow."""
        from importlib.metadata import version

        from reasonalloc.cli import eval_files
        from reasonalloc.evaluation.samples import decoding

        settings, sampling = self.settings, self.rules.sampling
        found = {
            "kind": "eval",
            "task": self.task,
            "data_hash": self.problems.hash,
            "model": self.spec.name,
            "config_hash": facts.config_hash,
            "weights_hash": facts.weights_hash,
            "template_hash": facts.template_hash,
            "dtype": facts.dtype,
            "device": facts.device,
            "protocol": self.protocol,
            **asdict(sampling),
            "samples": self.rules.samples,
            "max_new_tokens": self.rules.max_new_tokens,
            "seed": settings.seed,
            "interval": settings.interval,
            "window": settings.window,
            "n_sink": settings.n_sink,
            "protect_prompt": settings.protect_prompt,
            "profiles": self.files,
            "arm_files": eval_files.fingerprints(self.jobs, settings),
            "version": __version__,
            "code": {eval_files.code_hash(): __version__},
            "torch": version("torch"),
            "transformers": version("transformers"),
        }
        if self.spec.engine == "vllm":
            from reasonalloc.integrations.vllm.patches import version as vllm_version

            found |= {"engine": "vllm", "vllm": vllm_version()}
        else:  # samples depend on it by rounding alone
            found["decoding"] = {decoding(settings.step, settings.attention): __version__}
        if self.spec.tp_plan is not None:  # heads trade tokens inside a process only
            found["tp_size"] = int(os.environ["WORLD_SIZE"])
        return found | ({"math_verify": version("math-verify")} if self.kind.needs_math else {})


def _jobs(names: list[str], budgets: str, settings: Settings) -> list[Job]:
    from reasonalloc.evaluation.runner import make_jobs

    jobs = make_jobs(names, list(dict.fromkeys(o.parse_budgets(budgets))))
    for job in jobs:
        if job.budget is not None:
            settings.config(job)  # refuses a budget that cannot be
    return jobs


def _run(plan: _Plan, out: Path, as_json: bool) -> None:
    from reasonalloc.cli.eval_table import report
    from reasonalloc.cli.eval_watch import Watcher
    from reasonalloc.evaluation.folder import RunFolder
    from reasonalloc.evaluation.runner import InProcess, run
    from reasonalloc.evaluation.sharded import Leader, first_rank, follow
    from reasonalloc.evaluation.solver import make_solver

    chosen, rules = plan.problems.chosen, plan.rules
    arguments = (plan.spec, plan.settings, rules.sampling, rules.max_new_tokens)
    prompts = [problem.prompt for problem in chosen]
    if plan.spec.tp_plan is not None and not first_rank():
        solver = make_solver(*arguments)
        solver.check(plan.jobs, prompts)
        follow(solver)
        return
    with ExitStack() as stack:
        folder = stack.enter_context(RunFolder(out))
        watcher = Watcher(rules.max_new_tokens)
        with output.stderr().status("Loading the model"):
            executor: Any
            if plan.remote:
                from reasonalloc.evaluation.cluster import Cluster

                executor = stack.enter_context(
                    Cluster(arguments, plan.workers, plan.ray_address, watcher)
                )
                facts = executor.check(plan.jobs, prompts)
            else:
                solver = make_solver(*arguments)
                stack.callback(solver.close)
                executor = (Leader if plan.spec.tp_plan else InProcess)(solver, watcher)
                facts = solver.check(plan.jobs, prompts)
        checks.check_length(facts, rules.max_new_tokens)
        if facts.template_hash is None:
            output.note("this model has no chat template: problems are given as plain text")
        folder.open(plan.manifest(facts))
        chunks = plan.chunks(folder.done())
        left = sum(len(chunk.items) for chunk in chunks)
        total = len(plan.jobs) * len(chosen) * rules.samples
        if left < total:
            output.note(f"{total - left} of {total} samples are in {str(out)!r} already")
        try:
            with watcher.started(left):
                run(plan.task, plan.kind, chosen, chunks, folder, executor, watcher)
        except KeyboardInterrupt:
            missing = plan.chunks(folder.read_again())
            there = total - sum(len(chunk.items) for chunk in missing)
            output.note(
                f"interrupted: {there} of {total} samples are in {str(out)!r}; the same command "
                "goes on from there"
            )
            raise typer.Exit(130) from None
        _say_given_up(plan.kind)
        ids = [problem.id for problem in chosen]
        report(plan.jobs, folder.rows, ids, rules.samples, plan.task, as_json)


def _say_given_up(kind: Task) -> None:
    if not kind.needs_math:
        return
    from reasonalloc.evaluation.grading import math_grader

    if count := math_grader().given_up:
        output.note(f"{count} answers could not be compared in time and count as wrong")
