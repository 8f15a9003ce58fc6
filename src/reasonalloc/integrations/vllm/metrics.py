"""Prometheus metrics of an engine under a budget, beside vLLM's own at ``/metrics``.

They are derived, in the process that serves requests, from the token counts of finished requests
and the scheduler's own numbers. With several API servers each counts its own requests and
prometheus_client adds them up.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, Counter, Gauge
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from reasonalloc.integrations.vllm.accounting import Accounting
from reasonalloc.integrations.vllm.budget import find_budget
from reasonalloc.integrations.vllm.pages import stored_bytes

_PREFIX = "reasonalloc:"
_LABELS = ("model_name", "engine")
_COUNTERS = {
    "kv_tokens_kept": "Entries (tokens times layers times KV heads) that finished requests had in "
    "the cache at their end.",
    "kv_tokens_evicted": "Entries (tokens times layers times KV heads) that were evicted from "
    "finished requests.",
    "kv_bytes_saved": "Bytes of blocks that finished requests held less at their end than without "
    "a budget.",
    "compressions": "Boundaries of finished requests at which some layer was compressed.",
}


class BudgetMetrics(AggregateStatLoggerBase):
    """Entry point of ``vllm.stat_logger_plugins``; does nothing for an engine without a budget."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
        self._cache = vllm_config.cache_config
        plan = find_budget(vllm_config)
        self._accounting: Accounting | None = None
        if plan is None:
            return
        size = stored_bytes(self._cache.cache_dtype, vllm_config.model_config.dtype)
        self._accounting = Accounting(plan, self._cache.block_size, size)
        for collector in list(REGISTRY._collector_to_names):  # of an earlier engine, as vLLM does
            if getattr(collector, "_name", "").startswith(_PREFIX):
                REGISTRY.unregister(collector)
        self._counters = {
            name: Counter(_PREFIX + name, text, _LABELS) for name, text in _COUNTERS.items()
        }
        self._used = Gauge(
            f"{_PREFIX}kv_bytes_in_use",
            "Bytes of all blocks that requests hold now.",
            _LABELS,
            multiprocess_mode="mostrecent",
        )
        per_sequence = Gauge(
            f"{_PREFIX}kv_bytes_per_sequence",
            "Bytes of a sequence's blocks from its first compression on, without a pinned prompt.",
            _LABELS,
            multiprocess_mode="mostrecent",
        )
        name = vllm_config.model_config.served_model_name
        self._labels = {index: (name, str(index)) for index in engine_indexes or [0]}
        for labels in self._labels.values():
            per_sequence.labels(*labels).set(self._accounting.blocks * self._accounting.block_bytes)
            self._used.labels(*labels).set(0)
            for counter in self._counters.values():
                counter.labels(*labels)  # shown as 0 before the first request is finished

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """See vLLM's ``StatLoggerBase``."""
        accounting = self._accounting
        if accounting is None:
            return
        labels = self._labels[engine_idx]
        if scheduler_stats is not None and self._cache.num_gpu_blocks:
            engines = len(self._labels)  # vLLM adds the pools of all engines up
            blocks = self._cache.num_gpu_blocks // engines - 1
            used = round(scheduler_stats.kv_cache_usage * blocks)
            self._used.labels(*labels).set(used * accounting.block_bytes)
        if iteration_stats is None:
            return
        for request in iteration_stats.finished_requests:
            account = accounting.account(request.num_prompt_tokens, request.num_generation_tokens)
            saved = max(account.full_bytes - account.held_bytes, 0)
            for name, value in (
                ("kv_tokens_kept", account.kept),
                ("kv_tokens_evicted", account.evicted),
                ("kv_bytes_saved", saved),
                ("compressions", account.compressions),
            ):
                self._counters[name].labels(*labels).inc(value)

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
