"""A model that completes batches of samples: the same in this process and in a Ray worker."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from reasonalloc.config import RecordLevel
from reasonalloc.errors import CompressionNeverHappened
from reasonalloc.evaluation.batch import (
    BatchResult,
    Job,
    Settings,
    Watch,
    attach_job,
    is_memory,
    solve,
)
from reasonalloc.evaluation.chunks import Chunk, Facts, ModelSpec, Outcome
from reasonalloc.evaluation.facts import encode, model_facts
from reasonalloc.evaluation.kv_share import kv_sizes
from reasonalloc.evaluation.sampling import Sampling
from reasonalloc.loading import load_model, quiet
from reasonalloc.planning.memory import MemoryPlan
from reasonalloc.planning.shapes import layer_shapes, text_config


class Solver:
    """A loaded model and what it is run with.

    Args:
        spec: which model.
        settings: of the cache.
        sampling: how tokens are chosen.
        max_new_tokens: bound of generated tokens.
        loaded: a model and its tokenizer, which are not loaded by the name in ``spec`` then.

    Raises:
        UsageError: the model cannot be loaded.
    """

    def __init__(
        self,
        spec: ModelSpec,
        settings: Settings,
        sampling: Sampling,
        max_new_tokens: int,
        loaded: tuple[Any, Any] | None = None,
    ) -> None:
        self._model, self._tokenizer = loaded or load_model(
            spec.name,
            spec.dtype,
            spec.device,
            trust_remote_code=spec.trust_remote_code,
            device_map=spec.device_map,
            tp_plan=spec.tp_plan,
        )
        self._settings, self._sampling = settings, sampling
        self._max_new_tokens = max_new_tokens
        self._shapes = layer_shapes(text_config(self._model), spec.name)
        self._plans: dict[Job, MemoryPlan] = {}

    def check(self, jobs: Sequence[Job], prompts: Sequence[str]) -> Facts:
        """Refuse jobs that cannot run; say what the model is.

        Raises:
            UsageError: an unknown arm, a budget that does not fit, a broken or foreign profile.
            UnsupportedError: a model that cannot run under a budget.
        """
        for job in jobs:
            self._plan(job)
        return model_facts(self._model, self._tokenizer, prompts)

    def complete(
        self, chunk: Chunk, watch: Watch, record: RecordLevel
    ) -> tuple[list[list[int]], BatchResult]:
        """Complete a chunk in one batch; return its prompts as token ids and what was generated.

        Args:
            chunk: the samples.
            watch: is told the number of tokens so far.
            record: what is kept of every compression.

        Raises:
            UsageError: a prompt that cannot be encoded, or does not fit into the budget.
            Stopped: ``watch`` returned False.
        """
        prompts = [encode(self._tokenizer, item.prompt) for item in chunk.items]
        result = solve(
            self._model,
            prompts,
            chunk.job,
            replace(self._settings, record=record),
            self._max_new_tokens,
            watch,
            self._sampling,
            [item.seed for item in chunk.items],
        )
        return prompts, result

    def solve(self, chunk: Chunk, watch: Watch) -> Outcome:
        """Complete a chunk in one batch.

        Raises:
            UsageError: a prompt that cannot be encoded, or does not fit into the budget.
            Stopped: ``watch`` returned False.
        """
        record = chunk.record and chunk.job.budget is not None
        try:
            with quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore", CompressionNeverHappened)  # the runner says it
                prompts, result = self.complete(chunk, watch, "budgets" if record else "off")
        except (RuntimeError, MemoryError) as error:
            if not is_memory(error):
                raise
            reason = " ".join(str(error).split())
        else:
            events = self._events(chunk, prompts, result) if record else []
            return Outcome(self.rows(chunk, prompts, result), events)
        gc.collect()  # the traceback is gone here, and the cache with it
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Outcome(None, [], reason)

    def rows(
        self, chunk: Chunk, prompts: list[list[int]], result: BatchResult
    ) -> list[dict[str, Any]]:
        """Return one row per sample of a completed chunk, see ``runner.FIELDS``."""
        return [self._row(chunk, index, prompts, result) for index in range(len(prompts))]

    def close(self) -> None:
        """Nothing to end: the model goes with the solver."""

    def _plan(self, job: Job) -> MemoryPlan:
        """Memory of one sequence; the layers' totals."""
        if job not in self._plans:
            if job.budget is None:
                size = self._model.dtype.itemsize
                self._plans[job] = MemoryPlan(self._shapes, (), 1, 1, 1, size)
            else:
                with attach_job(self._model, job, self._settings) as attachment:
                    self._plans[job] = attachment.plan(1)
        return self._plans[job]

    def _row(
        self, chunk: Chunk, index: int, prompts: list[list[int]], result: BatchResult
    ) -> dict[str, Any]:
        item, job = chunk.items[index], chunk.job
        prompt, completion = prompts[index], result.completions[index]
        plan = self._plan_with(job, len(prompt))
        # The last token is never fed. What mates in the batch need beyond it is not this one's.
        tokens = len(prompt) + len(completion) - 1
        return {
            "arm": job.arm,
            "budget": job.budget,
            "problem": item.problem,
            "sample": item.sample,
            "seed": item.seed,
            "prompt": self._tokenizer.decode(prompt),
            "completion": self._tokenizer.decode(completion, skip_special_tokens=True),
            "prompt_tokens": len(prompt),
            "completion_tokens": len(completion),
            "finish": "stop" if result.ended[index] else "length",
            "compressions": sum(
                len(points) for points in plan.compressions(len(prompt), len(completion) - 1)
            ),
            "kv_bytes": plan.full_bytes(tokens) if job.budget is None else plan.kv_bytes(tokens),
            "full_kv_bytes": plan.full_bytes(tokens),
            **kv_sizes(plan, tokens, full=job.budget is None),
            "batch": len(prompts),
            "seconds": round(result.seconds, 3),
            "peak_bytes": result.peak_bytes,
        }

    def _plan_with(self, job: Job, prompt: int) -> MemoryPlan:
        """The same with what is pinned of a prompt."""
        pinned = 0 if job.budget is None else self._settings.config(job).pinned(prompt)
        return replace(self._plan(job), pinned=pinned)

    def _events(
        self, chunk: Chunk, prompts: list[list[int]], result: BatchResult
    ) -> list[dict[str, Any]]:
        """The first sequence's own compressions: those that its mates need are left out."""
        item, job = chunk.items[0], chunk.job
        padding = max(len(prompt) for prompt in prompts) - len(prompts[0])
        layers = [i for i, shape in enumerate(self._shapes) if shape.compressible]
        prompt, steps = len(prompts[0]), len(result.completions[0]) - 1
        points = self._plan_with(job, prompt).compressions(prompt, steps)
        own = dict(zip(layers, points, strict=True))
        return [
            {
                "arm": job.arm,
                "budget": job.budget,
                "problem": item.problem,
                "sample": item.sample,
                "tokens": event.step - padding,
                "layer": event.layer,
                "budgets": event.budgets[0].tolist(),
            }
            for event in result.events
            if event.step - padding in own[event.layer]
        ]
