"""Budgets of a vLLM engine: the same division among layers and heads as on transformers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from reasonalloc.config import CompressionConfig
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.integrations.vllm.coding import Coding
from reasonalloc.integrations.vllm.layout import Layout, make_layouts
from reasonalloc.integrations.vllm.observation import FLUSH
from reasonalloc.integrations.vllm.settings import find_settings, profile_digest
from reasonalloc.integrations.vllm.windows import Groups, Windows, divide
from reasonalloc.outputs import LateMetrics
from reasonalloc.planning.budget import BudgetPlan
from reasonalloc.planning.shapes import layer_shapes
from reasonalloc.planning.sharding import HeadShard


@dataclass(frozen=True, eq=False)
class EngineBudget(BudgetPlan):
    """A budget divided among the layers of a model that vLLM serves.

    Attributes:
        ranks: tensor-parallel processes.
        stages: layers of each pipeline-parallel stage, from the first to before the last; None: all
            are in one.
        in_flight, steps: most tokens and steps that are scheduled and not computed at a time, see
            ``Windows``.
        outputs: metrics of the layers, which workers fill in when they have the weights.
    """

    ranks: int = 1
    stages: tuple[tuple[int, int], ...] | None = None
    in_flight: int | None = None
    steps: int = 1
    outputs: LateMetrics = field(default_factory=LateMetrics, repr=False)

    def __post_init__(self) -> None:
        self._check_layers()
        check_storage(self.config)
        super().__post_init__()
        if self.stages is not None and self.groups.widths:
            raise UnsupportedError(
                f"pipeline_parallel_size={len(self.stages)} cannot be used with a KV budget and "
                f"{self.name} yet, whose layers have sliding windows: use tensor_parallel_size"
            )
        self.policy_of(self.shard(0))

    @property
    def coded(self) -> bool:
        """Whether older tokens are kept in fewer bits."""
        return self.memory(1).coded

    @property
    def bits(self) -> str:
        """The setting that asks for fewer bits, for messages."""
        if self.formats is not None:
            return f"layers={self.config.arm.layers!r}, which plans bits per head,"
        return f"kv_dtype={self.config.kv_dtype!r}"

    def _check_layers(self) -> None:
        for index, shape in enumerate(self.shapes):
            if shape.readers:
                what = f"a cache that layers {list(shape.readers)} read"
            elif shape.paired:
                what = "KV heads that read each other's values"
            elif shape.again is not None:
                what = f"the cache of layer {shape.again} in a further loop"
            elif shape.latent is not None:
                what = "latent attention (MLA)"
            elif shape.state is not None or not shape.kv_heads:
                what = "a state, or no cache at all"
            elif shape.bias or shape.distances:
                what = "attention with a bias by position (ALiBi) or distance"
            elif shape.sliding_window is not None and self._chunked:
                what = "attention in chunks"
            else:
                continue
            raise UnsupportedError(
                f"{self.name} cannot run under a KV budget in vLLM yet: layer {index} has {what}; "
                "run it on transformers"
            )
        if not self._alike:
            raise UnsupportedError(
                f"{self.name} cannot run under a KV budget in vLLM yet: its layers differ in "
                "shape; run it on transformers"
            )
        if len({(shape.kv_heads, shape.dims) for shape in self.shapes}) > 1:
            raise UnsupportedError(
                f"{self.name} cannot run under a KV budget in vLLM yet: its layers with a sliding "
                "window have other KV heads than those without; run it on transformers"
            )
        if self.groups.full > 1:
            raise UnsupportedError(
                f"{self.name} cannot run under a KV budget in vLLM yet: it has so few layers with "
                f"a sliding window that vLLM divides those without into {self.groups.full} groups; "
                "run it on transformers"
            )
        if self.kv_heads % self.ranks:
            raise UsageError(
                f"tensor_parallel_size={self.ranks}: {self.kv_heads} KV heads cannot be divided "
                "equally under a KV budget: give a number that divides them"
            )

    @property
    def _chunked(self) -> bool:
        return getattr(self.text_config, "attention_chunk_size", None) is not None

    @cached_property
    def groups(self) -> Groups:
        """How vLLM divides the layers."""
        return divide(self.shapes)

    @property
    def observed(self) -> int | None:
        """Last tokens before the first compression that every request computes itself; None: all.

        Those of a prompt that is evicted from; see ``Reserve``.
        """
        if self.policy.state_channels:
            return None
        return self.config.window if self.policy.needs_queries else 0

    @property
    def query_width(self) -> int:
        """Last queries of a request that are remembered, if the policy looks at any."""
        window = self.config.window
        return max(window, FLUSH) if self.policy.state_channels else window

    def cache_bytes(
        self, available: int, requests: int, itemsize: int, stored: int, stage: int = 0
    ) -> int:
        """Bytes of a KV cache that fits into memory with what a budget keeps beside it.

        Beside the cache are the position of every entry and what the policy knows of it (4 bytes
        for each number), and the last queries of every request.

        Args:
            available: bytes for all of it.
            requests: most that run at once.
            itemsize: bytes of a number of queries.
            stored: bytes of a number of keys and values.
            stage: whose layers they are.
        """
        shapes = [shape for shape in self.shapes if shape.sliding_window is None]
        shapes = shapes[self.stage(stage)]
        if self.policy.needs_queries or self.policy.state_channels:
            per_row = sum(shape.query_heads * shape.head_dim for shape in shapes) // self.ranks
            available -= requests * self.query_width * per_row * itemsize
        entry = sum(shapes[0].dims) * stored
        beside = 4 * (1 + self.policy.state_channels)
        return max(available, 0) * entry // (entry + beside)

    def shard(self, rank: int) -> HeadShard:
        """Return the KV heads of one rank."""
        return HeadShard(rank, self.ranks)

    def stage(self, number: int) -> slice:
        """Return the layers of a pipeline-parallel stage, of those under the budget."""
        return slice(None) if self.stages is None else slice(*self.stages[number])

    def layouts(self, block_size: int) -> tuple[Layout, ...]:
        """Return the layouts of all processes: of all ranks of a stage, stage after stage."""
        own = [[total for total, _ in self.parts(self.shard(rank))] for rank in range(self.ranks)]
        stages = range(1 if self.stages is None else len(self.stages))
        totals = [layers[self.stage(number)] for number in stages for layers in own]
        codings = None
        if self.coded:
            codings = [
                self._coding(self.shard(rank), self.stage(number), block_size)
                for number in stages
                for rank in range(self.ranks)
            ]
        pin = self.config.prompt == "pin"
        heads = self.kv_heads // self.ranks
        windows = Windows(self.groups.widths, block_size, self.in_flight, self.steps)
        interval = self.config.interval
        given = (pin, windows, self.observed, codings)
        return make_layouts(totals, heads, interval, block_size, *given)

    def _coding(self, shard: HeadShard, stage: slice, block_size: int) -> Coding:
        """How a process keeps the older tokens of a stage's layers."""
        heads = self.kv_heads // self.ranks
        same = (self.config.kv_dtype,) * heads
        kinds = [same if own is None else own for own in self.formats_of(shard)]
        planned = [own for _, own in self.parts(shard)] if self.formats is not None else None
        return Coding.of_kinds(
            kinds[stage],
            None if planned is None else [own or () for own in planned[stage]],
            self.config.window,
            next(shape.dims for shape in self.shapes if shape.compressible),
            self.dtype,
            block_size,
            self.policy.state_channels,
        )


def check_storage(config: CompressionConfig) -> None:
    """Refuse what vLLM's pages cannot hold yet: protected prompts.

    Raises:
        UnsupportedError: names it.
    """
    if config.pin_limit is not None:
        raise UnsupportedError(
            f"pin_limit={config.pin_limit} cannot run in vLLM yet: leave it out (a prompt that the "
            "pool cannot hold is refused)"
        )
    if config.prompt not in ("evict", "pin"):
        raise UnsupportedError(
            f"prompt={config.prompt!r} cannot run in vLLM yet: use prompt='evict' or prompt='pin'"
        )


_budgets: dict[tuple[Any, ...], EngineBudget] = {}


def find_budget(vllm_config: Any) -> EngineBudget | None:
    """Return the budget of an engine, or None if it runs without one.

    Args:
        vllm_config: vLLM's ``VllmConfig``.

    Raises:
        UsageError, UnsupportedError: settings or a model that cannot work.
    """
    config = find_settings(vllm_config.additional_config)
    model = vllm_config.model_config
    if config is None or model is None:
        return None
    last = model.max_model_len
    if model.original_max_model_len == -1:  # vLLM shortens it once it knows the memory
        last = getattr(model.hf_text_config, "max_position_embeddings", None) or 1 << 30
    config = up_to(config, last)
    parallel = vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size
    stages = divide_layers(model.hf_text_config, parallel.pipeline_parallel_size)
    in_flight, steps = vllm_config.max_in_flight_tokens, vllm_config.max_concurrent_batches
    given = (ranks, in_flight, steps, stages)
    read = profile_digest(vllm_config.additional_config)
    key = (config, read, model.model, str(model.hf_text_config), model.dtype, *given)
    if key not in _budgets:
        text, name = model.hf_text_config, model.model
        _budgets[key] = make_budget(config, name, text, *given, dtype=model.dtype)
    return _budgets[key]


def up_to(config: CompressionConfig, last: int) -> CompressionConfig:
    """The settings of an engine whose sequences have at most ``last`` tokens.

    A longer interval is none: no room is kept for tokens that cannot come.
    """
    return dataclasses.replace(config, interval=last) if config.interval > last else config


def divide_layers(text_config: Any, stages: int) -> tuple[tuple[int, int], ...] | None:
    """Return the layers of pipeline-parallel stages as vLLM divides them; None of one stage.

    Args:
        text_config: transformers' configuration of the decoder.
        stages: how many.

    Raises:
        UsageError: they cannot be divided so.
    """
    if stages == 1:
        return None
    from vllm.distributed.utils import get_pp_indices

    layers = text_config.num_hidden_layers
    try:
        found = tuple(get_pp_indices(layers, stage, stages) for stage in range(stages))
    except ValueError as error:  # of VLLM_PP_LAYER_PARTITION
        raise UsageError(f"pipeline_parallel_size={stages}: {error}") from None
    if any(first == end for first, end in found):
        raise UsageError(
            f"pipeline_parallel_size={stages}: {layers} layers leave a stage without any: give "
            f"{layers} at most, and no 0 in VLLM_PP_LAYER_PARTITION"
        )
    return found


def make_budget(
    config: CompressionConfig,
    name: str,
    text_config: Any,
    ranks: int,
    in_flight: int | None = None,
    steps: int = 1,
    stages: tuple[tuple[int, int], ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> EngineBudget:
    """Return the budget of a model whose weights need not be loaded.

    Args:
        config: the settings.
        name: of the model, for messages.
        text_config: transformers' configuration of the decoder.
        ranks: tensor-parallel processes.
        in_flight, steps, stages: of the engine, see ``EngineBudget``; without one a prompt is
            prefilled at once.
        dtype: of keys and values that are kept as they are.

    Raises:
        UsageError, UnsupportedError: settings or a model that cannot work.
    """
    shapes, outputs = layer_shapes(text_config, name), LateMetrics()
    return EngineBudget(
        config,
        shapes,
        text_config,
        name,
        load_output_metrics=outputs.ask,
        dtype=dtype,
        ranks=ranks,
        stages=stages,
        in_flight=in_flight,
        steps=steps,
        outputs=outputs,
    )
