"""Everything of vLLM that is wrapped, in one table; without a budget the wrappers do nothing."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.vllm import checks
from reasonalloc.integrations.vllm import request_wrappers as of_requests
from reasonalloc.integrations.vllm import scheduler_wrappers as of_scheduler
from reasonalloc.integrations.vllm import worker_wrappers as of_worker
from reasonalloc.integrations.vllm.budget import EngineBudget, find_budget
from reasonalloc.integrations.vllm.kernels import have_loops
from reasonalloc.integrations.vllm.patch import Patch


def _checked_engine(original: Callable[..., Any]) -> Callable[..., Any]:
    """An engine that is asked to keep a budget is refused if it cannot."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        from reasonalloc.integrations.vllm.settings import find_settings, with_settings

        settings = find_settings(self.additional_config)
        if settings is None:
            return original(self, *args, **kwargs)
        if _broken is not None:
            raise _broken
        self.additional_config = with_settings(self.additional_config, settings)
        asked = self.enable_prefix_caching
        checks.prepare(self)
        config = original(self, *args, **kwargs)
        checks.check_engine(config)
        checks.check_size(settings, config.cache_config.cache_dtype)
        plan = find_budget(config)
        if plan is not None and plan.groups.widths:
            checks.check_windows(config)
        if plan is not None and plan.coded:
            _check_bits(config, plan)
        checks.prepare_caching(config.cache_config, asked, plan)
        self.enable_prefix_caching = config.cache_config.enable_prefix_caching
        return config

    return wrapper


def _check_bits(config: Any, plan: EngineBudget) -> None:
    """Refuse an engine that could not read tokens in fewer bits."""
    from vllm.platforms import current_platform

    loops = current_platform.is_cpu() and not config.use_v2_model_runner
    able = not loops or have_loops(config.model_config.dtype)
    checks.check_bits(plan, config.cache_config.cache_dtype, able)
    if loops:
        checks.check_blocks(plan, config.cache_config.block_size)


_ENGINE = Patch("vllm.engine.arg_utils:EngineArgs.create_engine_config", (), _checked_engine)
PATCHES = (
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor._validate_prompt_len",
        ("prompt_len", "prompt_type"),
        of_requests.refuse_long_prompts,
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
        ("resumable",),
        of_requests.refuse_sessions,
    ),
    *(
        Patch(
            f"vllm.entrypoints.generate.beam_search.{kind.lower()}:BeamSearch{kind}Mixin.beam_search",
            (),
            of_requests.refuse_beams,
        )
        for kind in ("Offline", "Online")
    ),
    Patch(
        "vllm.model_executor.layers.attention.attention:Attention.__init__",
        ("attn_backend", "alibi_slopes"),
        of_worker.budget_backend,
    ),
    # The V1 model runner.
    Patch(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states",
        ("scheduler_output",),
        of_worker.forget_preempted,
    ),
    Patch(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata",
        ("num_scheduled_tokens",),
        of_worker.begin_v1,
    ),
    Patch(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward",
        ("input_ids", "positions"),
        of_worker.finish,
    ),
    # The V2 model runner.
    Patch(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_attn",
        ("input_batch",),
        of_worker.begin_v2,
    ),
    Patch(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.sample_tokens",
        ("grammar_output",),
        of_worker.finish,
    ),
    # Both.
    Patch(
        "vllm.v1.worker.gpu_worker:Worker.determine_available_memory",
        (),
        of_worker.leave_room,
    ),
    *(
        Patch(f"vllm.v1.worker.gpu_worker:Worker.{name}", (), of_worker.keep_weights)
        for name in ("reload_weights", "start_weight_update", "update_weights")
    ),
    Patch(
        "vllm.v1.kv_cache_interface:KVCacheConfig.needs_kv_cache_zeroing",
        (),
        of_scheduler.clean_blocks,
    ),
    Patch(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.__init__",
        (),
        of_scheduler.checked_groups,
    ),
    Patch(
        "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
        ("request",),
        of_scheduler.announce,
    ),
    *(
        Patch(
            f"vllm.v1.core.kv_cache_coordinator:{kind}KVCacheCoordinator.find_longest_cache_hit",
            ("block_hashes", "max_cache_hit_length"),
            of_scheduler.cap_hits,
        )
        for kind in ("Unitary", "Hybrid")
    ),
    Patch(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.cache_blocks",
        ("request", "num_computed_tokens"),
        of_scheduler.cache_prompts,
    ),
    Patch("vllm.v1.core.sched.scheduler:Scheduler.schedule", (), of_scheduler.pause),
    Patch(
        "vllm.v1.engine.core:EngineCore._finish_pause",
        ("clear_cache",),
        of_scheduler.resume_if_refused,
    ),
    Patch(
        "vllm.v1.core.sched.scheduler:Scheduler.reset_prefix_cache",
        ("reset_running_requests",),
        of_scheduler.check_reset,
    ),
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
