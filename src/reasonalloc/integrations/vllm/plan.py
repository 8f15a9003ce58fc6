"""Budgets of a vLLM engine: the same division among layers and heads as on transformers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from reasonalloc.config import CompressionConfig
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.integrations.vllm.layout import Layout, make_layouts
from reasonalloc.integrations.vllm.settings import find_settings
from reasonalloc.planning.budget import bound_policy, layer_totals, planned_heads
from reasonalloc.planning.memory import LayerShape
from reasonalloc.planning.shapes import layer_shapes
from reasonalloc.planning.sharding import HeadShard
from reasonalloc.policies import Policy


@dataclass(frozen=True)
class EnginePlan:
    """A budget divided among the layers of a model that vLLM serves.

    Attributes:
        config: the settings.
        name: the model's name, for messages and metrics.
        shapes: all attention layers.
        model_config: transformers' configuration of the decoder.
        ranks: tensor-parallel processes.
    """

    config: CompressionConfig
    name: str
    shapes: tuple[LayerShape, ...]
    model_config: Any
    ranks: int

    @cached_property
    def totals(self) -> tuple[int, ...]:
        """Retained tokens of each layer, all its KV heads together."""
        return layer_totals(self.config, self.shapes, self.model_config, self.name)

    @cached_property
    def planned(self) -> tuple[tuple[int, ...], ...] | None:
        """Tokens of every head, [layers][kv_heads], if the arm plans them beforehand."""
        return planned_heads(self.config, self.shapes, self.model_config, self.name)

    @cached_property
    def policy(self) -> Policy:
        """The policy, checked against the model.

        Raises:
            UnsupportedError: it needs what vLLM's attention does not give.
        """
        policy = bound_policy(
            self.config, self.shapes, self.model_config, self.name, load_rope=_no_rope
        )
        if policy.state_channels:
            raise UnsupportedError(
                f"policy={self.config.arm.policy!r} looks at the attention that every token "
                "receives, which vLLM's kernels do not give: use a policy that scores by the "
                "window's queries (rkv, snapkv, tova) or a cost profile that was calibrated with "
                "one of them"
            )
        return policy

    @property
    def kv_heads(self) -> int:
        """KV heads of a layer, all ranks together."""
        return self.shapes[0].kv_heads

    def shard(self, rank: int) -> HeadShard:
        """The KV heads of one rank."""
        return HeadShard(rank, self.ranks)

    def layouts(self, block_size: int) -> tuple[Layout, ...]:
        """Layouts of all ranks."""
        planned = self.planned or [None] * len(self.totals)
        totals = [
            [
                self.shard(rank).total(total, heads, self.kv_heads)
                for total, heads in zip(self.totals, planned, strict=True)
            ]
            for rank in range(self.ranks)
        ]
        return make_layouts(totals, self.kv_heads // self.ranks, self.config.interval, block_size)


def _no_rope() -> Any:
    raise UnsupportedError(
        "policy='tri_attention' needs the model's rotary embedding, which it cannot get at inside "
        "vLLM yet: use another policy"
    )


_plans: dict[tuple[Any, ...], EnginePlan] = {}


def find_plan(vllm_config: Any) -> EnginePlan | None:
    """The plan of an engine, or None if it runs without a budget.

    Args:
        vllm_config: vLLM's ``VllmConfig``.

    Raises:
        UsageError, UnsupportedError: settings or a model that cannot work.
    """
    config = find_settings(vllm_config.additional_config)
    model = vllm_config.model_config
    if config is None or model is None:
        return None
    ranks = vllm_config.parallel_config.tensor_parallel_size
    key = (config, model.model, str(model.hf_text_config), ranks)
    if key not in _plans:
        _plans[key] = make_plan(config, model.model, model.hf_text_config, ranks)
    return _plans[key]


def make_plan(config: CompressionConfig, name: str, text_config: Any, ranks: int) -> EnginePlan:
    """The plan of a model whose weights need not be loaded.

    Args:
        config: the settings.
        name: of the model, for messages.
        text_config: transformers' configuration of the decoder.
        ranks: tensor-parallel processes.

    Raises:
        UsageError, UnsupportedError: settings or a model that cannot work.
    """
    shapes = layer_shapes(text_config, name)
    for index, shape in enumerate(shapes):
        if not shape.compressible:
            raise UnsupportedError(
                f"{name} cannot run under a KV budget in vLLM yet: layer {index} has a "
                "sliding window; run it on transformers"
            )
    if shapes[0].kv_heads % ranks:
        raise UsageError(
            f"tensor_parallel_size={ranks}: {shapes[0].kv_heads} KV heads cannot be divided "
            "equally under a KV budget: give a number that divides them"
        )
    plan = EnginePlan(config, name, shapes, text_config, ranks)
    _ = plan.totals, plan.planned, plan.policy  # refused here, before anything is loaded
    return plan
