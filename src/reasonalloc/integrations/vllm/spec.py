"""The KV cache of a layer under a budget, as vLLM's scheduler sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
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

    With prefix caching, blocks of prompts may be shared until the first compression of a request.
    Its runs then go to the last ``Reserve.own`` blocks of its row, which are made to be its own:
    as many new ones as it takes to leave alone what others hold, and those that the cache could
    give to others, if there is room. The blocks before them are given back and null blocks stand
    in their places, as for sliding windows.
    """

    def __init__(self, kv_cache_spec: BudgetSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, *args, **kwargs)
        self._reserve = kv_cache_spec.reserve
        self._pool = self.block_pool.num_gpu_blocks - 1
        shared = self if self.enable_caching else None
        self.admission = Admission(self._reserve, self._pool, shared=shared)
        # Of requests that were compressed: first blocks of the row that still hold tokens of the
        # prompt, to be shared or given back.
        self._before: dict[str, int] = {}

    def most_cached(self, start: int) -> int:
        """Most tokens of a prefill of ``start`` that may come from the prefix cache."""
        return self._reserve.most_cached(start, self._pool)

    def shared(self, request_id: str) -> int:
        """First blocks of a request up to the last one that another one holds, too."""
        return _held(self.req_to_blocks.get(request_id, ()), by=2)

    def prefix(self, request_id: str) -> list[int]:
        """Numbers of the first blocks of a request that others may hold, too."""
        most = self._reserve.most_shared(self.admission.start(request_id), self._pool)
        row = self.req_to_blocks.get(request_id, ())[:most]
        return [block.block_id for block in takewhile(lambda block: not block.is_null, row)]

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Blocks that must be free: the missing ones, or more than there are if it must wait."""
        admission, reserve = self.admission, self._reserve
        shared = 0
        if request_id not in admission:
            shared = _held(new_computed_blocks, by=1)
            hits = [block.block_id for block in new_computed_blocks[:shared]]
            if not admission.can_admit(request_id, hits):
                return self.block_pool.num_gpu_blocks
        elif num_tokens == reserve.first_event(admission.start(request_id)):
            shared = self.shared(request_id)
        held = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        missing = reserve.needed(admission.start(request_id), num_tokens, shared) - held
        # Those of a prefix that nobody holds now are free and will not be.
        return max(missing, 0) + self._get_num_evictable_blocks(new_computed_blocks)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Let others find blocks that will not be written again: full ones of the prompt."""
        start = self.admission.start(request.request_id)
        stay = self._reserve.most_shared(start, self._pool)
        stay = min(stay, self._before.get(request.request_id, stay))
        super().cache_blocks(request, min(num_tokens, stay * self.block_size), *args, **kwargs)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Blocks for a step that ends with ``num_tokens`` tokens."""
        if request_id not in self.admission:
            self.admission.admit(request_id)
        blocks = self.req_to_blocks[request_id]
        start = self.admission.start(request_id)
        if num_tokens == self._reserve.first_event(start) and request_id not in self._before:
            needed = self._first_event(request_id, start, num_tokens)
        else:
            needed = self._reserve.needed(start, num_tokens)
        missing = needed - len(blocks)
        if missing <= 0:
            return []
        new = self.block_pool.get_new_blocks(missing)
        blocks.extend(new)
        if self.records_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new)
        return new

    def _first_event(self, request_id: str, start: int, num_tokens: int) -> int:
        """Blocks of a request, old and new, for its first compression; the last ones are its own.

        Blocks of the prompt that nobody holds besides stay in the prefix cache, as far as there is
        room for so many more; the others leave it.
        """
        reserve, blocks = self._reserve, self.req_to_blocks[request_id]
        needed = reserve.needed(start, num_tokens, self.shared(request_id))
        if self.enable_caching:
            cached = reserve.most_shared(start, self._pool)
            if (wanted := reserve.needed(start, num_tokens, cached)) > needed:
                needed = max(needed, self.admission.extend(request_id, wanted))
        before = self._before[request_id] = needed - reserve.own(start)
        written = {block.block_id for block in blocks[before:] if block.block_hash is not None}
        self.block_pool.evict_blocks(written)
        return needed

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Give back what a compressed request does not need any more."""
        if not self.req_to_blocks.get(request_id):
            return
        start = self.admission.start(request_id)
        if processed_computed_tokens >= start:
            self.admission.prefilled(request_id)  # groups with windows are told at the same time
        if (before := self._before.get(request_id)) is None:
            return
        if processed_computed_tokens < self._reserve.first_event(start):
            return
        stay = self._reserve.leading(start)
        self._remove_blocks_in_range(request_id, stay, before)
        self._before[request_id] = stay
        self.admission.settle(request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget a request."""
        self.admission.forget(request_id)
        self._before.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


def _held(blocks: Sequence[KVCacheBlock], by: int) -> int:
    """First blocks up to the last one that at least ``by`` requests hold."""
    return next((n for n in range(len(blocks), 0, -1) if blocks[n - 1].ref_cnt >= by), 0)


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
        """Whether blocks of prompts may be shared."""
        return self.reserve.shares

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Blocks in a row of the block table: of all tokens, and of what they are compressed to."""
        return -(-max_len // self.block_size) + self.reserve.own(max_len)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of the longest generation, its prompt left out, which may need more."""
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
