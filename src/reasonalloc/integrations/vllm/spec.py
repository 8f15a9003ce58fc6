"""The KV cache of a layer under a budget, as vLLM's scheduler sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.vllm.admission import Admission
from reasonalloc.integrations.vllm.layout import Reserve


class BudgetManager(FullAttentionManager):
    """Blocks of requests under a budget: growing until the first compression, constant after it.

    None is ever preempted: a preempted request would be computed anew, with other boundaries, and
    could continue differently. ``admission`` says who is admitted and who pauses.
    """

    def __init__(self, kv_cache_spec: BudgetSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._reserve = kv_cache_spec.reserve
        self.admission = Admission(self._reserve, self.block_pool.num_gpu_blocks - 1)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Blocks that must be free: the missing ones, or more than there are if it must wait."""
        admission = self.admission
        if request_id not in admission and not admission.can_admit(request_id):
            return self.block_pool.num_gpu_blocks
        held = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        missing = self._reserve.needed(admission.start(request_id), num_tokens) - held
        # Those of a prefix that nobody holds now are free and will not be.
        return max(missing, 0) + self._get_num_evictable_blocks(new_computed_blocks)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Let others find blocks that will not be written again: full ones of a pinned prompt."""
        start = self.admission.start(request.request_id)
        stays = self._reserve.leading(start) * self._reserve.block_size
        super().cache_blocks(request, min(num_tokens, stays), *args, **kwargs)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Blocks for a step that ends with ``num_tokens`` tokens."""
        if request_id not in self.admission:
            self.admission.admit(request_id)
        blocks = self.req_to_blocks[request_id]
        start = self.admission.start(request_id)
        missing = self._reserve.needed(start, num_tokens) - len(blocks)
        if missing <= 0:
            return []
        new = self.block_pool.get_new_blocks(missing)
        blocks.extend(new)
        return new

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Give back what a long prompt took and its compressed cache does not need."""
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        start = self.admission.start(request_id)
        if processed_computed_tokens >= start:
            self.admission.prefilled(request_id)  # groups with windows are told at the same time
        keep = self._reserve.held(start)
        if len(blocks) <= keep:
            return
        if processed_computed_tokens >= self._reserve.first_event(start):
            self.block_pool.free_blocks(reversed(blocks[keep:]))
            del blocks[keep:]
            self.admission.settle(request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget a request."""
        self.admission.forget(request_id)
        return super().pop_blocks_for_free(request_id)


def check_groups(managers: Sequence[Any]) -> None:
    """Refuse block managers of an engine under a budget that are not those that it counts on.

    Raises:
        UnsupportedError: says which there are.
    """
    own = [manager for manager in managers if isinstance(manager, BudgetManager)]
    if not own:
        return
    windows = own[0].kv_cache_spec.reserve.windows
    found = sorted(
        (manager.kv_cache_spec.sliding_window, manager.block_size)
        for manager in managers
        if isinstance(manager, SlidingWindowManager)
    )
    expected = sorted((width, windows.block_size) for width in windows.widths)
    if found != expected or len(own) + len(found) != len(managers) or len(own) > 1:
        kinds = [type(manager.kv_cache_spec).__name__ for manager in managers]
        raise UnsupportedError(
            f"vLLM divided the model's layers into groups of {', '.join(kinds)}, with windows and "
            f"block sizes {found} instead of {expected}, which cannot run under a KV budget: run "
            "it on transformers"
        )


# vLLM registers its own specs at the first look into an empty registry: look before adding to it.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})


@register_kv_cache_spec(manager_class=BudgetManager)
@dataclass(frozen=True, kw_only=True)
class BudgetSpec(FullAttentionSpec):
    """Full attention under a budget; the same for all layers, whatever they keep."""

    reserve: Reserve

    @property
    def prefix_cacheable(self) -> bool:
        """Compressed blocks are no prefix of anything, those of pinned prompts are."""
        return self.reserve.pin

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of the longest generation; a long prompt may need more for a moment."""
        last = vllm_config.model_config.max_model_len
        return self.reserve.peak(1, last) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: Sequence[Any]) -> Any:
        """One spec for all layers."""
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("layers under a budget must share one KV cache spec")
        return specs[0]


def budget_spec(spec: Any, reserve: Reserve) -> BudgetSpec:
    """A layer's KV cache ``spec`` under a budget; all else stays as it is."""
    return replace_as(spec, BudgetSpec, reserve=reserve)
