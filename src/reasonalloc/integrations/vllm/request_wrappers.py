"""Wrappers of vLLM's front end: requests that cannot be served under a budget are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reasonalloc.integrations.vllm.budget import find_budget
from reasonalloc.integrations.vllm.checks import check_prompt


def refuse_long_prompts(original: Callable[..., Any]) -> Callable[..., Any]:
    """A prompt that the pool can never hold is refused, instead of waiting for ever."""

    def wrapper(self: Any, prompt_len: int, prompt_type: str) -> None:
        original(self, prompt_len, prompt_type)
        plan = find_budget(self.vllm_config)
        cache = self.vllm_config.cache_config
        if plan is None or not cache.num_gpu_blocks:
            return
        blocks = cache.num_gpu_blocks // _engines(self.vllm_config.parallel_config) - 1
        reserve = plan.layouts(cache.block_size)[0].reserve
        last = self.vllm_config.model_config.max_model_len
        problem = check_prompt(prompt_len, reserve, blocks, last)
        if problem is not None:
            raise _refusal(problem)

    return wrapper


def _engines(parallel: Any) -> int:
    """Engines whose blocks a front end has summed up: those that it manages."""
    if parallel.data_parallel_rank_local is not None:
        return 1
    if parallel.local_engines_only:
        return int(parallel.data_parallel_size_local)
    return int(parallel.data_parallel_size)


def refuse_sessions(original: Callable[..., Any]) -> Callable[..., Any]:
    """A request whose input comes in pieces is refused: it would have several prompts."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("resumable") and find_budget(self.vllm_config) is not None:
            raise _refusal(
                "streaming input (a request whose prompt goes on after its answer) cannot be used "
                "with a KV budget: send each turn as a request with the whole conversation"
            )
        return original(self, *args, **kwargs)

    return wrapper


def refuse_beams(original: Callable[..., Any]) -> Callable[..., Any]:
    """Beam search is refused: every token would be a request of its own, and none compressed."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        owner = self.llm_engine if hasattr(self, "llm_engine") else self.engine_client
        if find_budget(owner.vllm_config) is not None:
            raise _refusal(
                "beam search cannot be used with a KV budget: every token is a request of its own "
                "in vLLM, so that nothing would be evicted; use sampling, with n > 1 for several "
                "answers"
            )
        return original(self, *args, **kwargs)

    return wrapper


def _refusal(problem: str) -> Exception:
    """What vLLM's server answers with as a bad request."""
    from vllm.exceptions import VLLMValidationError

    error: Exception = VLLMValidationError(problem)
    return error
