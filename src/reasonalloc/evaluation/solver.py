"""A model that completes batches of samples: the same in this process and in a Ray worker."""

from __future__ import annotations

import gc
import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from reasonalloc.calibrated.demand import config_hash
from reasonalloc.core.cadence import compression_points
from reasonalloc.errors import CompressionNeverHappened, UsageError
from reasonalloc.evaluation.batch import BatchResult, Job, Settings, Watch, attach_job, solve
from reasonalloc.evaluation.sampling import Sampling
from reasonalloc.loading import load_model, quiet
from reasonalloc.planning.memory import MemoryPlan
from reasonalloc.planning.shapes import layer_shapes, text_config


@dataclass(frozen=True)
class ModelSpec:
    """What ``load_model`` is called with."""

    name: str
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    device_map: str | None = None
    tp_plan: str | None = None
    engine: str = "transformers"


@dataclass(frozen=True)
class Item:
    """One sample to be taken: the problem's id and prompt, the sample's number and seed."""

    problem: str
    prompt: str
    sample: int
    seed: int


@dataclass(frozen=True)
class Chunk:
    """What is completed in one batch.

    Attributes:
        job: arm and budget.
        items: the samples.
        record: whether the head budgets of the first one are recorded.
    """

    job: Job
    items: tuple[Item, ...]
    record: bool = False

    def split(self, size: int) -> list[Chunk]:
        """The same in batches of at most ``size``."""
        parts = [self.items[i : i + size] for i in range(0, len(self.items), size)]
        return [replace(self, items=p, record=self.record and i == 0) for i, p in enumerate(parts)]


@dataclass(frozen=True)
class Outcome:
    """What became of a chunk: one row per item, or None if memory did not suffice.

    ``events`` are the rows of ``events.jsonl``; ``reason`` is the allocator's own message.
    """

    rows: list[dict[str, Any]] | None
    events: list[dict[str, Any]]
    reason: str = ""


@dataclass(frozen=True)
class Facts:
    """What a manifest and the checks before a run need to know of a loaded model.

    Attributes:
        config_hash, weights_hash, template_hash: fingerprints; the last is None without a chat
            template.
        dtype, device: as loaded.
        longest: tokens of the longest prompt.
        positions: tokens that the model has positions for, if it says so.
    """

    config_hash: str
    weights_hash: str
    template_hash: str | None
    dtype: str
    device: str
    longest: int
    positions: int | None


class Solver:
    """A loaded model and what it is run with.

    Args:
        spec: which model.
        settings: of the cache.
        sampling: how tokens are chosen.
        max_new_tokens: bound of generated tokens.

    Raises:
        UsageError: the model cannot be loaded.
    """

    def __init__(
        self, spec: ModelSpec, settings: Settings, sampling: Sampling, max_new_tokens: int
    ) -> None:
        self._model, self._tokenizer = load_model(
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

    def solve(self, chunk: Chunk, watch: Watch) -> Outcome:
        """Complete a chunk in one batch.

        Raises:
            UsageError: a prompt that cannot be encoded, or does not fit into the budget.
            Stopped: ``watch`` returned False.
        """
        prompts = [encode(self._tokenizer, item.prompt) for item in chunk.items]
        record = chunk.record and chunk.job.budget is not None
        try:
            with quiet(), warnings.catch_warnings():
                warnings.simplefilter("ignore", CompressionNeverHappened)  # the runner says it
                result = solve(
                    self._model,
                    prompts,
                    chunk.job,
                    replace(self._settings, record="budgets" if record else "off"),
                    self._max_new_tokens,
                    watch,
                    self._sampling,
                    [item.seed for item in chunk.items],
                )
        except (RuntimeError, MemoryError) as error:
            if not is_memory(error):
                raise
            reason = " ".join(str(error).split())
        else:
            return Outcome(
                [self._row(chunk, index, prompts, result) for index in range(len(prompts))],
                self._events(chunk, prompts, result) if record else [],
            )
        gc.collect()  # the traceback is gone here, and the cache with it
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return Outcome(None, [], reason)

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
        item, job, plan = chunk.items[index], chunk.job, self._plan(chunk.job)
        prompt, completion = prompts[index], result.completions[index]
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
                len(points) for points in self._points(job, len(prompt), len(completion))
            ),
            "kv_bytes": plan.full_bytes(tokens) if job.budget is None else plan.kv_bytes(tokens),
            "full_kv_bytes": plan.full_bytes(tokens),
            "batch": len(prompts),
            "seconds": round(result.seconds, 3),
            "peak_bytes": result.peak_bytes,
        }

    def _points(self, job: Job, prompt: int, completion: int) -> list[list[int]]:
        """Per layer under a budget, tokens of a sequence at its compressions."""
        plan = self._plan(job)
        heads = next(shape.kv_heads for shape in self._shapes if shape.compressible)
        return [
            compression_points(total, heads, self._settings.interval, prompt, completion - 1)
            for total in plan.totals
        ]

    def _events(
        self, chunk: Chunk, prompts: list[list[int]], result: BatchResult
    ) -> list[dict[str, Any]]:
        """The first sequence's own compressions: those that its mates need are left out."""
        item, job = chunk.items[0], chunk.job
        padding = max(len(prompt) for prompt in prompts) - len(prompts[0])
        layers = [i for i, shape in enumerate(self._shapes) if shape.compressible]
        points = self._points(job, len(prompts[0]), len(result.completions[0]))
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


def make_solver(
    spec: ModelSpec, settings: Settings, sampling: Sampling, max_new_tokens: int
) -> Any:
    """The solver of a model's engine: a ``Solver``, or what stands for one.

    Arguments and errors are those of ``Solver``.
    """
    if spec.engine == "vllm":
        from reasonalloc.evaluation.vllm_solver import VllmSolver

        return VllmSolver(spec, settings, sampling, max_new_tokens)
    return Solver(spec, settings, sampling, max_new_tokens)


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a problem, in the model's chat template if it has one.

    Raises:
        UsageError: the template refuses it.
    """
    if not getattr(tokenizer, "chat_template", None):
        ids: list[int] = tokenizer(prompt + "\n")["input_ids"]
        return ids
    try:
        encoded = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )
    except Exception as error:  # templates are programs and raise what they like
        raise UsageError(f"the model's chat template refuses a prompt: {error}") from error
    return list(encoded["input_ids"])


def model_facts(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Facts:
    """What a loaded model is, and the longest of the prompts."""
    template, device = getattr(tokenizer, "chat_template", None), model.device
    return Facts(
        config_hash=config_hash(text_config(model).to_dict()),
        weights_hash=weights_hash(model),
        template_hash=None if not template else _hash(str(template).encode()),
        dtype=str(model.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        longest=max(len(encode(tokenizer, prompt)) for prompt in prompts),
        positions=getattr(text_config(model), "max_position_embeddings", None),
    )


def weights_hash(model: Any) -> str:
    """Fingerprint of a model's weights: names, shapes and up to 256 numbers of each tensor.

    Before transformers 5.18 a divided model's tensors are this process's parts.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype};".encode())
        if hasattr(weight, "full_tensor"):  # divided among processes, each of which comes here
            weight = weight.full_tensor()
        if not weight.is_meta:  # offloaded: there is nothing to look at
            flat = weight.detach().reshape(-1)
            some = flat[:: max(1, flat.numel() // 256)].to("cpu", torch.float32)
            digest.update(some.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    signs = ("out of memory", "defaultcpuallocator", "status_alloc_failed")  # torch's, cuBLAS's
    return any(sign in text for sign in signs)
