"""Run arms on chain problems: one batch, greedy, graded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from reasonalloc.config import RecordLevel, parse_arm
from reasonalloc.evaluation.tasks.chain import ChainProblem, grade
from reasonalloc.integrations.hf import attach
from reasonalloc.integrations.hf.cache import held_bytes
from reasonalloc.integrations.hf.model import end_tokens
from reasonalloc.recorder import Event

FULL = "full"
#: Tokens that a completion may be longer than the exact chain, end tokens included.
SPARE_TOKENS = 16

#: Called after every generated token (per sequence) with their number; False stops the run.
Watch = Callable[[int], bool]


class Stopped(Exception):
    """The watcher asked to stop: the run has no result."""


@dataclass(frozen=True)
class Job:
    """One arm at one budget; ``budget`` is None for the full cache."""

    arm: str
    budget: int | None = None

    def __str__(self) -> str:
        return "full cache" if self.budget is None else f"{self.arm}, budget {self.budget}"


@dataclass(frozen=True)
class Settings:
    """What all jobs share.

    Attributes:
        interval: generated tokens between two compressions.
        window: most recent tokens that are always kept.
        profile: profile file for arms whose layer allocator reads one.
        record: what the recorder keeps of every compression.
        max_new_tokens: bound of generated tokens; None: what the longest exact chain needs.
    """

    interval: int
    window: int
    profile: str | os.PathLike[str] | None = None
    record: RecordLevel = "off"
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class ArmResult:
    """What one job did.

    Attributes:
        job: arm and budget.
        correct: per problem, whether the answer is right.
        prompts: per problem, token ids of the prompt.
        completions: per problem, generated token ids, up to the end token and with it.
        kv_bytes: bytes of keys and values per sequence, measured when the last token was there;
            the most that the run held, since slabs do not grow and the full cache does not shrink.
        seconds: wall time of the whole ``generate`` call.
        prefill_seconds: wall time until every sequence had its first token.
        compressions: layer compressions; 0 with a budget means that it never came to one.
        events: what the recorder kept.
    """

    job: Job
    correct: tuple[bool, ...]
    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]
    kv_bytes: int
    seconds: float
    prefill_seconds: float
    compressions: int = 0
    events: tuple[Event, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens of all sequences per second of wall time, reading prompts included."""
        return sum(len(c) for c in self.completions) / self.seconds if self.seconds > 0 else 0.0


class _Meter(StoppingCriteria):
    """Passes progress on, and stops all sequences when asked to."""

    def __init__(self, watch: Watch, prompt_tokens: int) -> None:
        self._watch, self._prompt_tokens = watch, prompt_tokens
        self.stopped = False
        self.first_token_at: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.first_token_at is None:
            self.first_token_at = time.perf_counter()
        self.stopped = not self._watch(input_ids.shape[1] - self._prompt_tokens)
        return torch.full((input_ids.shape[0],), self.stopped, device=input_ids.device)


def run_job(
    model: Any,
    tokenizer: Any,
    problems: Sequence[ChainProblem],
    job: Job,
    settings: Settings,
    watch: Watch = lambda _: True,
) -> ArmResult:
    """Solve the problems in one batch, greedily, until every sequence has ended.

    Raises:
        Stopped: ``watch`` returned False.
    """
    chats = [[{"role": "user", "content": problem.prompt}] for problem in problems]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    width = int(inputs["input_ids"].shape[1])
    meter = _Meter(watch, width)
    limit = settings.max_new_tokens
    if limit is None:
        limit = max(problem.solution_tokens for problem in problems) + SPARE_TOKENS
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        cache: Any = DynamicCache(config=model.config)
        if job.budget is not None:
            cache = stack.enter_context(_attach(model, job, settings)).new_cache()
        began = time.perf_counter()
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            past_key_values=cache,
            max_new_tokens=limit,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([meter]),
        )
        seconds = time.perf_counter() - began
    if meter.stopped:
        raise Stopped
    held = held_bytes(cache.layers) if job.budget is None else cache.kv_bytes
    ends = end_tokens(model)
    completions = [_until(row, ends) for row in output[:, width:].tolist()]
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    masks = inputs["attention_mask"].bool()
    return ArmResult(
        job=job,
        correct=tuple(
            grade(problem.prompt, text).correct
            for problem, text in zip(problems, texts, strict=True)
        ),
        prompts=tuple(
            tuple(ids[mask].tolist()) for ids, mask in zip(inputs["input_ids"], masks, strict=True)
        ),
        completions=tuple(tuple(c) for c in completions),
        kv_bytes=held // len(problems),
        seconds=seconds,
        prefill_seconds=(meter.first_token_at or began) - began,
        compressions=0 if job.budget is None else cache.recorder.compressions,
        events=() if job.budget is None else tuple(cache.recorder.events),
    )


def check_jobs(model: Any, jobs: Sequence[Job], settings: Settings) -> None:
    """Refuse what cannot run before anything does.

    Raises:
        UsageError: an unknown arm, a budget that does not fit, a broken or foreign profile.
    """
    for job in jobs:
        if job.budget is not None:
            with _attach(model, job, settings):
                pass


def needs_profile(arm: str) -> bool:
    """Whether an arm's layer budgets come from a profile file that is given apart."""
    parsed = parse_arm(arm)
    return parsed is not None and parsed.layers == "profile"


def _attach(model: Any, job: Job, settings: Settings) -> Any:
    return attach(
        model,
        budget=job.budget or 0,
        arm=job.arm,
        interval=settings.interval,
        window=settings.window,
        profile=settings.profile if needs_profile(job.arm) else None,
        record=settings.record,
    )


def _until(tokens: list[int], ends: list[int]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens
