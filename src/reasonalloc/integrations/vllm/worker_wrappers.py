"""Wrappers of vLLM's workers: which backend layers get, and what happens around a forward pass."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.vllm.budget import EngineBudget, find_budget
from reasonalloc.integrations.vllm.pages import stored_bytes

# Names of vLLM's own requests; those of users end in a hyphen and random digits.
_WARM_UP = re.compile(r"_\w*warmup_(\d+|prefill|decode)_")


def budget_backend(original: Callable[..., Any]) -> Callable[..., Any]:
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
    if given["alibi_slopes"] is not None:  # of positions, which pages do not know
        raise UnsupportedError(
            f"{plan.name} cannot run under a KV budget in vLLM: its attention has a bias by "
            "position (ALiBi); run it on transformers"
        )
    cache = given["cache_config"]
    stock = backend.stock_backend(
        given["head_size"],
        "auto" if cache is None else cache.cache_dtype,
        given["attn_type"],
        given["extra_impl_args"].get("sinks") is not None,
    )
    return backend.backend_of(plan, stock)


def forget_preempted(original: Callable[..., Any]) -> Callable[..., Any]:
    """V1: requests that begin anew later (a forced reset) hold nothing until then.

    V2 drops them itself.
    """

    def wrapper(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler_output.preempted_req_ids:
            for _, builder in _builders(self):
                builder.forget(scheduler_output.preempted_req_ids)
        return original(self, scheduler_output, *args, **kwargs)

    return wrapper


def begin_v1(original: Callable[..., Any]) -> Callable[..., Any]:
    """V1: the metadata builder is told which requests a real step has."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        scheduled = kwargs.get("num_scheduled_tokens")
        if scheduled is not None:
            names = self.input_batch.req_ids
            starts = [self.requests[name].num_tokens for name in names]
            before = self.input_batch.num_computed_tokens_cpu[: len(names)].tolist()
            new = [scheduled[name] for name in names]
            for group, builder in _builders(self):
                builder.know(self.model)
                held = self.input_batch.block_table[group].num_blocks_per_row[: len(names)].tolist()
                builder.begin(self.requests, names, starts, before, new, held)
        return original(self, *args, **kwargs)

    return wrapper


def begin_v2(original: Callable[..., Any]) -> Callable[..., Any]:
    """V2: the same. Warm-up requests hold fewer blocks than real ones: they stay unknown."""

    def wrapper(self: Any, input_batch: Any) -> Any:
        names = input_batch.req_ids
        if not any(_WARM_UP.fullmatch(name) for name in names):
            starts = input_batch.prefill_len_np.tolist()
            before = input_batch.num_computed_tokens_np.tolist()
            new = input_batch.num_scheduled_tokens.tolist()
            known = self.req_states.req_id_to_index
            for group, builder in _builders(self):
                builder.know(self.model)
                rows = self.block_tables.num_blocks.np[group]
                held = [int(rows[known[name]]) for name in names]
                builder.begin(known, names, starts, before, new, held)
        return original(self, input_batch)

    return wrapper


def finish(original: Callable[..., Any]) -> Callable[..., Any]:
    """Boundaries are dealt with when the model has run."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        with torch.inference_mode():
            for _, builder in _builders(self):
                builder.finish()
        return output

    return wrapper


def leave_room(original: Callable[..., Any]) -> Callable[..., Any]:
    """What a budget keeps beside the KV cache is no part of the memory that a GPU has for it."""

    def wrapper(self: Any) -> int:
        given = self.cache_config.kv_cache_memory_bytes  # vLLM may set it itself
        available: int = original(self)
        from reasonalloc.integrations.vllm.builder import own_stage

        plan = find_budget(self.vllm_config)
        if plan is None or given:  # as the user has it
            return available
        requests = self.vllm_config.scheduler_config.max_num_seqs
        own = self.model_config.dtype
        stored = stored_bytes(self.cache_config.cache_dtype, own)
        left = plan.cache_bytes(available, requests, own.itemsize, stored, own_stage(plan))
        if available > 0 and left == 0:
            raise UnsupportedError(
                f"--max-num-seqs {requests}: the last queries of so many requests, which the "
                f"policy looks at, take all of the {available / 2**30:.1f} GiB that are left for "
                "the KV cache: give fewer, such as --max-num-seqs 128, or more memory "
                "(--gpu-memory-utilization)"
            )
        return left

    return wrapper


def keep_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    """New weights are refused where something was copied from the old ones."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        for _, builder in _builders(self.model_runner):
            if builder.copied is not None:
                raise UnsupportedError(
                    "weights cannot be replaced under a KV budget that has copied from them: "
                    f"{builder.copied}; start the engine anew"
                )
        return original(self, *args, **kwargs)

    return wrapper


def _builders(runner: Any) -> list[tuple[int, Any]]:
    """KV cache groups and metadata builders of a runner with a budget; none of another one."""
    from reasonalloc.integrations.vllm.builder import BudgetBuilder

    return [
        (number, group.get_metadata_builder(0))
        for number, groups in enumerate(getattr(runner, "attn_groups", ()))
        for group in groups
        if isinstance(group.get_metadata_builder(0), BudgetBuilder)
    ]
