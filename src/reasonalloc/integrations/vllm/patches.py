"""Everything of vLLM that is wrapped, in one table; without a budget the wrappers do nothing."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.vllm import checks
from reasonalloc.integrations.vllm.admission import Admission
from reasonalloc.integrations.vllm.budget import EngineBudget, find_budget
from reasonalloc.integrations.vllm.pages import stored_bytes

if TYPE_CHECKING:
    from reasonalloc.integrations.vllm.spec import BudgetManager

_MARK = "_reasonalloc_wrapped"
# Names of vLLM's own requests; those of users end in a hyphen and random digits.
_WARM_UP = re.compile(r"_\w*warmup_(\d+|prefill|decode)_")


@dataclass(frozen=True)
class Patch:
    """One wrapped method.

    Attributes:
        where: ``module:Class.method``.
        needs: parameters that the wrapper relies on.
        wrap: takes the original, returns the wrapper.
    """

    where: str
    needs: tuple[str, ...]
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]]

    def apply(self) -> None:
        """Wrap the method, once.

        Raises:
            UnsupportedError: it is not there or has other parameters.
        """
        module, _, path = self.where.partition(":")
        owner_name, _, name = path.partition(".")
        owner = getattr(importlib.import_module(module), owner_name, None)
        original = getattr(owner, name, None)
        if original is None:
            raise UnsupportedError(f"this vLLM has no {self.where}: install a supported version")
        if getattr(original, _MARK, False):
            return
        parameters = inspect.signature(original).parameters
        if missing := [needed for needed in self.needs if needed not in parameters]:
            raise UnsupportedError(
                f"{self.where} of this vLLM has no parameter {missing[0]!r}: install a supported "
                "version"
            )
        wrapper = functools.wraps(original)(self.wrap(original))
        setattr(wrapper, _MARK, True)
        setattr(owner, name, wrapper)


def _budget_backend(original: Callable[..., Any]) -> Callable[..., Any]:
    """Decoder layers of an engine with a budget get its attention backend."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config

        plan = find_budget(get_current_vllm_config())
        if plan is not None:
            given = inspect.signature(original).bind(self, *args, **kwargs)
            given.apply_defaults()
            if not _windowed(plan, given.arguments):
                kwargs["attn_backend"] = _backend(plan, given.arguments)
        original(self, *args, **kwargs)

    return wrapper


def _windowed(plan: EngineBudget, given: Mapping[str, Any]) -> bool:
    """Whether a layer has a sliding window, and so no budget.

    Args:
        plan: the budget.
        given: arguments of vLLM's ``Attention``.

    Raises:
        UnsupportedError: vLLM's model does not follow its configuration.
    """
    cache, window = given["cache_config"], given["per_layer_sliding_window"]
    if window is None and cache is not None:
        window = cache.sliding_window
    if window is None and not plan.groups.widths:
        return False
    from vllm.model_executor.models.utils import extract_layer_index

    layer = extract_layer_index(given["prefix"])
    expected = plan.shapes[layer].sliding_window
    if window != expected:
        raise UnsupportedError(
            f"{plan.name} cannot run under a KV budget in vLLM: its layer {layer} has a sliding "
            f"window of {window} tokens there, and of {expected} by its configuration; run it on "
            "transformers"
        )
    return window is not None


def _backend(plan: EngineBudget, given: Mapping[str, Any]) -> Any:
    """The attention backend of a layer under a budget, made with ``given`` arguments."""
    from reasonalloc.integrations.vllm import backend

    if given["attn_backend"] is not None:
        raise UnsupportedError(
            f"{plan.name} cannot run under a KV budget: it brings its own attention"
        )
    cache = given["cache_config"]
    stock = backend.stock_backend(
        given["head_size"],
        "auto" if cache is None else cache.cache_dtype,
        given["attn_type"],
        given["extra_impl_args"].get("sinks") is not None,
    )
    return backend.backend_of(plan, stock)


def _begin_v1(original: Callable[..., Any]) -> Callable[..., Any]:
    """V1: the metadata builder is told which requests a real step has."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        scheduled = kwargs.get("num_scheduled_tokens")
        if scheduled is not None:
            names = self.input_batch.req_ids
            starts = [self.requests[name].num_tokens for name in names]
            before = self.input_batch.num_computed_tokens_cpu[: len(names)].tolist()
            new = [scheduled[name] for name in names]
            for group, builder in _builders(self):
                held = self.input_batch.block_table[group].num_blocks_per_row[: len(names)].tolist()
                builder.begin(self.requests, names, starts, before, new, held)
        return original(self, *args, **kwargs)

    return wrapper


def _begin_v2(original: Callable[..., Any]) -> Callable[..., Any]:
    """V2: the same. Warm-up requests hold fewer blocks than real ones: they stay unknown."""

    def wrapper(self: Any, input_batch: Any) -> Any:
        names = input_batch.req_ids
        if not any(_WARM_UP.fullmatch(name) for name in names):
            starts = input_batch.prefill_len_np.tolist()
            before = input_batch.num_computed_tokens_np.tolist()
            new = input_batch.num_scheduled_tokens.tolist()
            known = self.req_states.req_id_to_index
            for group, builder in _builders(self):
                rows = self.block_tables.num_blocks.np[group]
                held = [int(rows[known[name]]) for name in names]
                builder.begin(known, names, starts, before, new, held)
        return original(self, input_batch)

    return wrapper


def _finish(original: Callable[..., Any]) -> Callable[..., Any]:
    """Boundaries are dealt with when the model has run."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        with torch.inference_mode():
            for _, builder in _builders(self):
                builder.finish()
        return output

    return wrapper


def _builders(runner: Any) -> list[tuple[int, Any]]:
    """KV cache groups and metadata builders of a runner with a budget; none of another one."""
    from reasonalloc.integrations.vllm.builder import BudgetBuilder

    return [
        (number, group.get_metadata_builder(0))
        for number, groups in enumerate(runner.attn_groups)
        for group in groups
        if isinstance(group.get_metadata_builder(0), BudgetBuilder)
    ]


def _checked_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    """All block managers are those that admission counts on."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        from reasonalloc.integrations.vllm.spec import check_groups

        original(self, *args, **kwargs)
        check_groups(self.coordinator.single_type_managers)

    return wrapper


def _announce(original: Callable[..., Any]) -> Callable[..., Any]:
    """The block manager learns how long a request may get before it is admitted."""

    def wrapper(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if (admission := _admission(self)) is not None:
            last = min(request.num_prompt_tokens + request.max_tokens, self.max_model_len)
            admission.announce(request.request_id, request.num_tokens, last)
        return original(self, request, *args, **kwargs)

    return wrapper


def _cap_hits(original: Callable[..., Any]) -> Callable[..., Any]:
    """A request computes itself what its policy has to see, however much of it is cached."""

    def wrapper(self: Any, block_hashes: Any, max_cache_hit_length: int) -> Any:
        if (manager := _budget_manager(self)) is not None:
            # vLLM asks for all tokens of the prefill but the last one.
            cap = manager.most_cached(max_cache_hit_length + 1)
            max_cache_hit_length = min(max_cache_hit_length, cap)
        return original(self, block_hashes, max_cache_hit_length)

    return wrapper


def _pause(original: Callable[..., Any]) -> Callable[..., Any]:
    """Requests that have to pause are not there while a step is scheduled.

    vLLM would preempt one whose blocks cannot be had.
    """

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        admission = _admission(self.kv_cache_manager)
        if admission is None:
            return original(self, *args, **kwargs)
        before = self.running
        admission.expect(min(len(self.waiting), self.max_num_running_reqs - len(before)))
        paused = admission.pause(
            {r.request_id: r.num_tokens_with_spec + r.num_output_placeholders for r in before}
        )
        self.running = [r for r in before if r.request_id not in paused]
        try:
            return original(self, *args, **kwargs)
        finally:
            if paused:
                hidden = [r for r in before if r.request_id in paused]
                order = {r.request_id: place for place, r in enumerate(before)}
                self.running = sorted(
                    [*hidden, *self.running],
                    key=lambda r: order.get(r.request_id, len(order)),
                )

    return wrapper


def _admission(manager: Any) -> Admission | None:
    """What admits the requests of a ``KVCacheManager`` with a budget; None of another one."""
    single = _budget_manager(manager.coordinator)
    return None if single is None else single.admission


def _budget_manager(coordinator: Any) -> BudgetManager | None:
    """The block manager with a budget of a ``KVCacheCoordinator``; None of another one."""
    from reasonalloc.integrations.vllm.spec import BudgetManager

    for single in coordinator.single_type_managers:
        if isinstance(single, BudgetManager):
            return single
    return None


def _checked_engine(original: Callable[..., Any]) -> Callable[..., Any]:
    """An engine that is asked to keep a budget is refused if it cannot."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        from reasonalloc.integrations.vllm.settings import find_settings

        if find_settings(self.additional_config) is None:
            return original(self, *args, **kwargs)
        if _broken is not None:
            raise _broken
        asked = self.enable_prefix_caching
        checks.prepare(self)
        config = original(self, *args, **kwargs)
        checks.check_engine(config)
        plan = find_budget(config)
        if plan is not None and plan.groups.widths:
            checks.check_windows(config)
        checks.prepare_caching(config.cache_config, asked, plan)
        self.enable_prefix_caching = config.cache_config.enable_prefix_caching
        return config

    return wrapper


def _refuse_long_prompts(original: Callable[..., Any]) -> Callable[..., Any]:
    """A prompt that the pool can never hold is refused, instead of waiting for ever."""

    def wrapper(self: Any, prompt_len: int, prompt_type: str) -> None:
        original(self, prompt_len, prompt_type)
        plan = find_budget(self.vllm_config)
        cache = self.vllm_config.cache_config
        if plan is None or not cache.num_gpu_blocks:
            return
        engines = self.vllm_config.parallel_config.data_parallel_size
        blocks = cache.num_gpu_blocks // engines - 1
        reserve = plan.layouts(cache.block_size)[0].reserve
        last = self.vllm_config.model_config.max_model_len
        problem = checks.check_prompt(prompt_len, reserve, blocks, last)
        if problem is not None:
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(problem)

    return wrapper


def _leave_room(original: Callable[..., Any]) -> Callable[..., Any]:
    """What a budget keeps beside the KV cache is no part of the memory that a GPU has for it."""

    def wrapper(self: Any) -> int:
        available: int = original(self)
        from reasonalloc.integrations.vllm.builder import own_stage

        plan = find_budget(self.vllm_config)
        if plan is None or self.cache_config.kv_cache_memory_bytes:  # as the user has it
            return available
        requests = self.vllm_config.scheduler_config.max_num_seqs
        own = self.model_config.dtype
        stored = stored_bytes(self.cache_config.cache_dtype, own)
        return plan.cache_bytes(available, requests, own.itemsize, stored, own_stage(plan))

    return wrapper


_ENGINE = Patch("vllm.engine.arg_utils:EngineArgs.create_engine_config", (), _checked_engine)
PATCHES = (
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor._validate_prompt_len",
        ("prompt_len", "prompt_type"),
        _refuse_long_prompts,
    ),
    Patch(
        "vllm.model_executor.layers.attention.attention:Attention.__init__",
        ("attn_backend",),
        _budget_backend,
    ),
    # The V1 model runner.
    Patch(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata",
        ("num_scheduled_tokens",),
        _begin_v1,
    ),
    Patch(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward",
        ("input_ids", "positions"),
        _finish,
    ),
    # The V2 model runner.
    Patch(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_attn",
        ("input_batch",),
        _begin_v2,
    ),
    Patch(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens",
        ("grammar_output",),
        _finish,
    ),
    # Both.
    Patch("vllm.v1.worker.gpu_worker:Worker.determine_available_memory", (), _leave_room),
    Patch("vllm.v1.core.kv_cache_manager:KVCacheManager.__init__", (), _checked_groups),
    Patch(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
        ("request",),
        _announce,
    ),
    *(
        Patch(
            f"vllm.v1.core.kv_cache_coordinator:{kind}KVCacheCoordinator.find_longest_cache_hit",
            ("block_hashes", "max_cache_hit_length"),
            _cap_hits,
        )
        for kind in ("Unitary", "Hybrid")
    ),
    Patch("vllm.v1.core.sched.scheduler:Scheduler.schedule", (), _pause),
)


_broken: UnsupportedError | None = None  # why this vLLM cannot run under a budget


def apply_patches() -> None:
    """Wrap everything in the table; harmless when repeated.

    A vLLM that does not fit runs on as it is, and refuses an engine that asks for a budget.
    """
    global _broken
    _ENGINE.apply()
    try:
        checks.check_version(version())
        for patch in PATCHES:
            patch.apply()
    except UnsupportedError as error:
        _broken = error


def version() -> str:
    """The version of vLLM, under whatever name it is installed."""
    return importlib.metadata.version(importlib.metadata.packages_distributions()["vllm"][0])
