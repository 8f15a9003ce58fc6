"""Wrappers of vLLM's scheduler: requests are admitted and pause by what their budget needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.vllm.admission import Admission

if TYPE_CHECKING:
    from reasonalloc.integrations.vllm.spec import BudgetManager


def checked_groups(original: Callable[..., Any]) -> Callable[..., Any]:
    """All block managers are those that admission counts on."""

    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        from reasonalloc.integrations.vllm.spec import check_groups

        original(self, *args, **kwargs)
        check_groups(self.coordinator.single_type_managers)

    return wrapper


def clean_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    """Whoever gets a block finds numbers in it.

    In a block that was given back may be tokens in fewer bits, which as numbers may be none, and
    vLLM's kernels multiply what is hidden by zero.
    """

    def wrapper(self: Any) -> bool:
        reserves = (getattr(g.kv_cache_spec, "reserve", None) for g in self.kv_cache_groups)
        dirty = any(reserve is not None and reserve.coded for reserve in reserves)
        return dirty or bool(original(self))

    return wrapper


def announce(original: Callable[..., Any]) -> Callable[..., Any]:
    """The block manager learns how long a request may get before it is admitted."""

    def wrapper(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        if (admission := _admission(self)) is not None:
            admission.announce(request.request_id, request.num_tokens, _last(self, request))
        return original(self, request, *args, **kwargs)

    return wrapper


def cap_hits(original: Callable[..., Any]) -> Callable[..., Any]:
    """A request computes itself what its policy has to see, however much of it is cached."""

    def wrapper(self: Any, block_hashes: Any, max_cache_hit_length: int) -> Any:
        if (manager := _budget_manager(self)) is not None:
            # vLLM asks for all tokens of the prefill but the last one.
            cap = manager.most_cached(max_cache_hit_length + 1)
            max_cache_hit_length = min(max_cache_hit_length, cap)
        return original(self, block_hashes, max_cache_hit_length)

    return wrapper


def cache_prompts(original: Callable[..., Any]) -> Callable[..., Any]:
    """Others find prompts alone, in all groups; windows are kept where such hits may end.

    What layers with windows compute of an answer depends on what the others have lost. And vLLM
    keeps windows before a prompt's last block alone, where a request may not resume that computes
    more of its end itself.
    """

    def wrapper(self: Any, request: Any, num_computed_tokens: int) -> Any:
        if (manager := _budget_manager(self)) is not None:
            start, size = manager.admission.start(request.request_id), manager.block_size
            num_computed_tokens = min(num_computed_tokens, start)
            reach = manager.most_cached(start) // size * size
            if not request.shared_prefix_boundary and reach < (start - 1) // size * size:
                request.shared_prefix_boundary = reach
        return original(self, request, num_computed_tokens)

    return wrapper


def check_reset(original: Callable[..., Any]) -> Callable[..., Any]:
    """Requests that run are begun anew only if the pool holds all their tokens, uncompressed."""

    def wrapper(self: Any, reset_running_requests: bool = False, *args: Any, **kwargs: Any) -> Any:
        admission = _admission(self.kv_cache_manager)
        if reset_running_requests and admission is not None:
            long = [r for r in self.running if not admission.fits(r.num_tokens, _last(self, r))]
            if long:
                raise UnsupportedError(
                    f"reset_prefix_cache(reset_running_requests=True): {len(long)} of "
                    f"{len(self.running)} running requests cannot be begun anew under a KV budget, "
                    "since the whole KV cache does not hold their tokens uncompressed: wait for "
                    "them, abort them, or give the engine more KV cache memory"
                )
        return original(self, reset_running_requests, *args, **kwargs)

    return wrapper


def resume_if_refused(original: Callable[..., Any]) -> Callable[..., Any]:
    """An engine that was to stand still with an empty cache, and cannot empty it, runs on."""

    def wrapper(self: Any, clear_cache: bool) -> Any:
        try:
            return original(self, clear_cache)
        except UnsupportedError:
            self.resume_scheduler()
            raise

    return wrapper


def pause(original: Callable[..., Any]) -> Callable[..., Any]:
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


def _last(owner: Any, request: Any) -> int:
    """Most tokens that a request will have; ``owner``: a scheduler or ``KVCacheManager``."""
    most: int = min(request.num_prompt_tokens + request.max_tokens, owner.max_model_len)
    return most


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
