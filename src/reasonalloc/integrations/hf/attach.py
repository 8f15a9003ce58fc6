"""``attach`` a KV budget to a transformers model, ``detach`` it again."""

from __future__ import annotations

import dataclasses
import functools
import os
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch

from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.attention import choose_backend
from reasonalloc.cache import MemoryPlan
from reasonalloc.compressor import LayerCompressor
from reasonalloc.config import Arm, CompressionConfig, RecordLevel, Step, parse_arm
from reasonalloc.errors import (
    CompressionNeverHappened,
    OtherCadence,
    UnsupportedError,
    UsageError,
)
from reasonalloc.integrations.hf import attention
from reasonalloc.integrations.hf.cache import BudgetCache
from reasonalloc.integrations.hf.generation import check_generate, check_result
from reasonalloc.integrations.hf.model import check_model, text_config
from reasonalloc.integrations.hf.projection import output_metrics
from reasonalloc.integrations.hf.rope import read_rope
from reasonalloc.integrations.hf.sharding import find_shard
from reasonalloc.integrations.hf.step import StaticStep, check_step
from reasonalloc.planning import (
    bound_policy,
    layer_totals,
    other_cadence,
    plan_memory,
    planned_heads,
)
from reasonalloc.recorder import Recorder

_HANDLE = "_reasonalloc"


class Attachment:
    """A model with a KV budget. Use it as a context manager, or call ``detach``.

    Attributes:
        config: the settings.
        shapes: all attention layers of the model.
        totals: retained tokens per layer under a budget, all its KV heads together.
        planned: the same per KV head, [layers][kv_heads], if the arm plans them beforehand.
        shard: which KV heads are in this process. The three above, and ``plan``, are of the whole
            model; the cache holds this process's part.
    """

    def __init__(self, model: Any, config: CompressionConfig) -> None:
        self.config = config
        self.shapes = check_model(model)
        self.shard = find_shard(model, self.shapes)
        check_step(config.step, model, self.shapes, self.shard.size)
        self._heads = HEAD_ALLOCATORS.create(config.arm.heads)
        self._backend = choose_backend(
            config.attention, model.device, model.dtype, compiled=config.step == "compile"
        )
        self._text_config = text_config(model)
        if self._text_config._attn_implementation == attention.IMPLEMENTATION:
            raise UsageError(
                "this model shares its configuration with a model that has a KV budget: give it a "
                "copy of the configuration, or detach the other one"
            )
        name = getattr(model.config, "_name_or_path", "") or type(model).__name__
        self._name = name
        self._policy = bound_policy(
            config,
            self.shapes,
            self._text_config,
            name,
            lambda: read_rope(model),
            lambda: output_metrics(model),
        )
        if self.shard.size > 1 and getattr(self._policy, "reads", None) == "statistics":
            raise UnsupportedError(
                f"policy={config.arm.policy!r} reads statistics of all heads, but this process "
                f"holds one of {self.shard.size} parts (tp_plan): use another policy, or device_map"
            )
        self.totals = layer_totals(config, self.shapes, self._text_config, name)
        self.planned = planned_heads(config, self.shapes, self._text_config, name)
        if (note := other_cadence(config)) is not None:
            warnings.warn(note, OtherCadence, stacklevel=4)  # where attach() was called
        self._model: Any = model
        self._own_generate = model.__dict__.get("generate")
        self._original = self._implementations(self._text_config._attn_implementation)
        self._last: weakref.ref[BudgetCache] | None = None
        self.recorder: Recorder | None = None

    def plan(self, batch: int = 1, dtype: torch.dtype | None = None) -> MemoryPlan:
        """Exact bytes of a cache for ``batch`` sequences (dtype: the model's)."""
        itemsize = (dtype or self._model.dtype).itemsize
        return plan_memory(self.config, self.shapes, self.totals, batch, itemsize)

    def totals_at(self, budget: int) -> tuple[int, ...]:
        """``totals`` as they would be under another budget."""
        config = dataclasses.replace(self.config, budget=budget)
        return layer_totals(config, self.shapes, self._text_config, self._name)

    @property
    def attached(self) -> bool:
        """Whether the model still runs under the budget."""
        return self._model is not None

    def _implementations(self, name: str) -> str | dict[str, str]:
        """What ``set_attn_implementation`` takes to change the text model alone."""
        config = self._model.config
        if self._text_config is config:
            return name
        keys = [k for k in config.sub_configs if getattr(config, k, None) is self._text_config]
        return dict.fromkeys(keys, name)

    def new_cache(self) -> BudgetCache:
        """An empty cache, for ``generate(..., past_key_values=cache)`` or a plain forward call."""
        self._require_model()
        recorder, shard = Recorder(self.config.record), self.shard
        totals = iter(self.totals)
        planned = iter(self.planned or [None] * len(self.totals))
        layers: list[LayerCompressor | None] = []
        for index, shape in enumerate(self.shapes):
            if not shape.compressible:
                layers.append(None)
                continue
            total, heads = next(totals), next(planned)
            layers.append(
                LayerCompressor(
                    index,
                    shard.total(total, heads, shape.kv_heads),
                    self.config,
                    self._policy,
                    self._heads,
                    self._backend,
                    recorder,
                    None if heads is None else shard.heads(heads),
                )
            )
        shapes = tuple(shard.shape(shape) for shape in self.shapes)
        cache = BudgetCache(layers, shapes, recorder, self)
        self._last, self.recorder = weakref.ref(cache), recorder
        return cache

    @contextmanager
    def decoding(self, cache: BudgetCache) -> Iterator[None]:
        """Inside, single new tokens are never padding, and steps run as ``config.step`` says."""
        model = self._require_model()
        with cache.only_real_tokens():
            if self.config.step == "eager":
                yield
                return
            own = model.__dict__.get("forward")
            step = StaticStep(model.forward, cache, model.device, self.config.step)
            model.__dict__["forward"] = step
            try:
                yield
            finally:
                del model.__dict__["forward"]
                if own is not None:
                    model.__dict__["forward"] = own

    @property
    def cache(self) -> BudgetCache | None:
        """The cache of the latest ``generate`` call, while something still holds it."""
        return None if self._last is None else self._last()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate`` on a compressed cache; same arguments, same result."""
        model = self._require_model()
        cache = check_generate(model, self, args, kwargs)
        kwargs["past_key_values"] = cache
        own = self._own_generate or functools.partial(type(model).generate, model)
        with self.decoding(cache):
            result = own(*args, **kwargs)
        check_result(result, cache)
        if cache.recorder.compressions == 0:
            warnings.warn(
                f"the cache was never compressed: {cache.get_seq_length()} tokens per sequence did "
                f"not exceed the budget of {self.config.budget} at any boundary "
                f"(every {self.config.interval} tokens), so this run equals the full cache",
                CompressionNeverHappened,
                stacklevel=2,
            )
        return result

    def detach(self) -> None:
        """Give the model its own attention and ``generate`` back; harmless when repeated."""
        model, self._model = self._model, None
        if model is None:
            return
        model.__dict__.pop("generate", None)
        if self._own_generate is not None:
            model.__dict__["generate"] = self._own_generate
        model.__dict__.pop(_HANDLE, None)
        model.set_attn_implementation(self._original)

    def _install(self) -> None:
        attention.register()
        self._model.set_attn_implementation(self._implementations(attention.IMPLEMENTATION))
        self._model.__dict__[_HANDLE] = self
        self._model.__dict__["generate"] = self.generate

    def _require_model(self) -> Any:
        if self._model is None:
            raise UsageError("this attachment was detached: call attach() again")
        return self._model

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()


def attach(
    model: Any,
    *,
    budget: int,
    arm: str | None = None,
    policy: str | None = None,
    layers: str | None = None,
    heads: str | None = None,
    interval: int = 128,
    window: int = 8,
    n_sink: int = 0,
    protect_prompt: bool = False,
    seed: int = 0,
    profile: str | os.PathLike[str] | None = None,
    attention: str = "auto",
    step: Step = "eager",
    record: RecordLevel = "off",
) -> Attachment:
    """Put a KV budget on a transformers model; ``model.generate`` then works as before.

    Args:
        model: a decoder-only model from ``AutoModelForCausalLM``.
        budget: mean retained tokens per (layer, KV head) right after a compression.
        arm: a preset (``reasonalloc ls``) or ``policy/layers/heads``; instead of the next three.
        policy: which tokens stay (default ``rkv``).
        layers: how many per layer (default ``uniform``).
        heads: how many per KV head (default ``uniform``).
        interval, window, n_sink, protect_prompt, seed, profile, attention, step, record: see
            ``CompressionConfig``.

    Returns:
        The attachment: a context manager with ``detach``, ``plan``, ``new_cache``, ``recorder``.

    Raises:
        UsageError: a wrong argument.
        UnsupportedError: a model that cannot work, with the reason.
    """
    if arm is not None:
        given = {"policy": policy, "layers": layers, "heads": heads}
        if clash := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"arm={arm!r} and {clash[0]}={given[clash[0]]!r}: give one of the two")
        parsed = parse_arm(arm)
        if parsed is None:
            raise UsageError("arm='full' means no compression: do not attach anything")
    else:
        default = Arm()
        parsed = Arm(
            default.policy if policy is None else policy,
            default.layers if layers is None else layers,
            default.heads if heads is None else heads,
        )
    config = CompressionConfig(
        budget=budget,
        arm=parsed,
        interval=interval,
        window=window,
        n_sink=n_sink,
        protect_prompt=protect_prompt,
        seed=seed,
        profile=profile,
        attention=attention,
        step=step,
        record=record,
    )
    return attach_config(model, config)


def attach_config(model: Any, config: CompressionConfig) -> Attachment:
    """``attach`` with settings that are put together already."""
    if getattr(model, "__dict__", {}).get(_HANDLE) is not None:
        raise UsageError("this model has a KV budget already: detach(model) first")
    attachment = Attachment(model, config)
    attachment._install()
    return attachment


def detach(model: Any) -> None:
    """Remove the KV budget from a model, if it has one."""
    attachment = getattr(model, "__dict__", {}).get(_HANDLE)
    if isinstance(attachment, Attachment):
        attachment.detach()
