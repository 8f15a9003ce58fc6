"""One arm on one batch of prompts."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from reasonalloc.config import (
    CompressionConfig,
    PinOverflow,
    Prompt,
    RecordLevel,
    Step,
    parse_arm,
)
from reasonalloc.core.recorder import Event
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.sampling import Sampling, SeededSampling
from reasonalloc.integrations.hf import Attachment, attach_config
from reasonalloc.integrations.hf.model import end_tokens
from reasonalloc.integrations.hf.own_cache import full_bytes, full_cache
from reasonalloc.integrations.hf.versions import with_cache
from reasonalloc.planning.files import files_missing

FULL = "full"

#: Called after every generated token (per sequence) with their number; False stops the run.
Watch = Callable[[int], bool]


class Stopped(Exception):
    """The watcher asked to stop: the run has no result."""


@dataclass(frozen=True)
class Job:
    """One arm at one budget: tokens, or the text of one in bytes; None for the full cache."""

    arm: str
    budget: int | str | None = None

    def __str__(self) -> str:
        return "full cache" if self.budget is None else f"{self.arm}, budget {self.budget}"


@dataclass(frozen=True)
class Settings:
    """What all jobs share.

    Attributes:
        interval: generated tokens between two compressions.
        window: most recent tokens that are always kept.
        profile: calibrated file for arms that read one.
        costs, statistics: files of these kinds, if ``profile`` is of another one.
        record: what the recorder keeps of every compression.
        n_sink: first tokens that are always kept.
        prompt, pin_limit, pin_overflow, protect_prompt: what happens to the prompt, see
            ``CompressionConfig``.
        kv_dtype: how older tokens are kept.
        seed: of the policy ``random``.
        attention, step: backend, and how decode steps run; see ``CompressionConfig``.
    """

    interval: int
    window: int
    profile: str | os.PathLike[str] | None = None
    costs: str | os.PathLike[str] | None = None
    record: RecordLevel = "off"
    n_sink: int = 0
    protect_prompt: bool = False
    seed: int = 0
    statistics: str | os.PathLike[str] | None = None
    attention: str = "auto"
    step: Step = "eager"
    prompt: Prompt = "evict"
    pin_limit: int | None = None
    pin_overflow: PinOverflow = "refuse"
    kv_dtype: str = "auto"

    @property
    def in_manifest(self) -> dict[str, Any]:
        """What is kept of the prompt and in how many bits; older files have the first alone."""
        entries: dict[str, Any] = {
            "protect_prompt": self.protect_prompt or self.prompt == "protect"
        }
        if self.prompt == "pin":
            entries["pin_prompt"] = {"limit": self.pin_limit, "overflow": self.pin_overflow}
        return entries if self.kv_dtype == "auto" else {**entries, "kv_dtype": self.kv_dtype}

    def config(self, job: Job) -> CompressionConfig:
        """Settings of the cache for a job that has a budget."""
        arm = parse_arm(job.arm)
        if arm is None:
            raise UsageError(f"arm {job.arm!r} has no budget")
        files = {"cost profile": self.costs, "statistics": self.statistics}
        read = [files.get(kind) or self.profile for kind in files_missing(arm).values()]
        return CompressionConfig(
            budget=cast("int", job.budget or 0),
            arm=arm,
            interval=self.interval,
            window=self.window,
            n_sink=self.n_sink,
            prompt=self.prompt,
            pin_limit=self.pin_limit,
            pin_overflow=self.pin_overflow,
            protect_prompt=self.protect_prompt,
            kv_dtype=self.kv_dtype,
            seed=self.seed,
            profile=read[0] if read else None,
            record=self.record,
            attention=self.attention,
            step=self.step,
        )


@dataclass(frozen=True)
class BatchResult:
    """What one batch did.

    Attributes:
        completions: per sequence, generated token ids, up to the end token and with it.
        ended: per sequence, whether it ended by itself.
        kv_bytes: bytes of keys and values of the whole batch, measured when the last token was
            there; the most that the run held, since slabs do not grow and the full cache does not
            shrink.
        seconds: wall time of the whole ``generate`` call.
        prefill_seconds: wall time until every sequence had its first token.
        peak_bytes: most memory that the process had allocated on its GPUs during the call; without
            a GPU the largest resident size of the process so far; None where nobody tells.
        compressions: layer compressions; 0 with a budget means that it never came to one.
        events: what the recorder kept.
    """

    completions: tuple[tuple[int, ...], ...]
    ended: tuple[bool, ...]
    kv_bytes: int
    seconds: float
    prefill_seconds: float
    peak_bytes: int | None
    compressions: int = 0
    events: tuple[Event, ...] = ()


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
        return torch.full(
            (input_ids.shape[0],), self.stopped, dtype=torch.bool, device=input_ids.device
        )


def solve(
    model: Any,
    prompts: Sequence[Sequence[int]],
    job: Job,
    settings: Settings,
    max_new_tokens: int,
    watch: Watch = lambda _: True,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seeds: Sequence[int] = (),
) -> BatchResult:
    """Complete the prompts in one batch until every sequence has ended.

    The model's own defaults for sampling and its repetition penalty play no part.

    Args:
        model: a transformers model, not attached to anything.
        prompts: token ids, each at least one.
        job: arm and budget.
        settings: of the cache.
        max_new_tokens: bound of generated tokens.
        watch: is told the number of tokens so far.
        sampling: how tokens are chosen.
        seeds: one per prompt, unless greedy.

    Raises:
        Stopped: ``watch`` returned False.
    """
    ids, mask = padded(prompts, pad_token(model), model.device)
    width = ids.shape[1]
    meter = _Meter(watch, width)
    processors = [] if sampling.greedy else [SeededSampling(sampling, seeds)]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        cache = full_cache(model)
        if job.budget is not None:
            cache = stack.enter_context(attach_job(model, job, settings)).new_cache()
        _reset_peak()
        began = time.perf_counter()
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            **with_cache({}, cache),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=1.0,
            pad_token_id=pad_token(model),
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([meter]),
        )
        seconds = time.perf_counter() - began
    if meter.stopped:
        raise Stopped
    ends = end_tokens(model)
    completions = [until_end(row, ends) for row in output[:, width:].tolist()]
    return BatchResult(
        completions=tuple(tuple(c) for c in completions),
        ended=tuple(c[-1] in ends for c in completions),
        kv_bytes=full_bytes(cache) if job.budget is None else cache.kv_bytes,
        seconds=seconds,
        prefill_seconds=(meter.first_token_at or began) - began,
        peak_bytes=_peak(),
        compressions=0 if job.budget is None else cache.recorder.compressions,
        events=() if job.budget is None else tuple(cache.recorder.events),
    )


def attach_job(model: Any, job: Job, settings: Settings) -> Attachment:
    """``attach`` for a job that has a budget."""
    return attach_config(model, settings.config(job))


def pad_token(model: Any) -> int:
    """A token id for padding, which nothing ever reads."""
    for source in (model.generation_config, model.config):
        token = getattr(source, "pad_token_id", None)
        if isinstance(token, int):
            return token
    return (end_tokens(model) or [0])[0]


def padded(
    prompts: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and mask [batch, longest], int64, padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, dtype=torch.int64, device=device), torch.tensor(
        mask, dtype=torch.int64, device=device
    )


def until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """Tokens up to the first end token, and with it."""
    for index, token in enumerate(tokens):
        if token in ends:
            return tokens[: index + 1]
    return tokens


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    signs = ("out of memory", "defaultcpuallocator", "status_alloc_failed")  # torch's, cuBLAS's
    return any(sign in text for sign in signs)


def _reset_peak() -> None:
    for index in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(index)


def _peak() -> int | None:
    if torch.cuda.is_available():
        return sum(
            torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())
        )
    try:
        import resource
    except ModuleNotFoundError:  # not on this system
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
