"""Plan a budget for a model, a configuration of one, or the name of one."""

from __future__ import annotations

import os
from typing import Any, cast

import torch

from reasonalloc.allocators.head import HeadAllocator
from reasonalloc.allocators.layer import LayerAllocator
from reasonalloc.config import Arm, CompressionConfig, choose_arm
from reasonalloc.planning.budget import TOKENS, BudgetPlan
from reasonalloc.planning.shapes import layer_shapes, model_name, text_config
from reasonalloc.policies import Policy


def plan(
    model: Any,
    *,
    budget: int | str,
    batch: int = 1,
    tokens: int = TOKENS,
    prompt_tokens: int = 0,
    arm: str | Arm | None = None,
    policy: str | Policy | type[Policy] | None = None,
    layers: str | LayerAllocator | type[LayerAllocator] | None = None,
    heads: str | HeadAllocator | type[HeadAllocator] | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    **settings: Any,
) -> BudgetPlan:
    """Divide a budget among the layers of a model whose weights need not be loaded.

    Args:
        model: a transformers model, its configuration, or a hub name, folder or ``.gguf`` file, of
            which only the configuration is read.
        budget: mean retained tokens per (layer, KV head) right after a compression; or bytes of a
            sequence, as ``"64MiB"`` or ``"25%@8192"``.
        batch, tokens: sequences, and tokens of each, to compare the caches at.
        prompt_tokens: tokens of the prompt, which ``prompt="pin"`` keeps on top of the budget.
        arm: a preset (``reasonalloc ls``), ``policy/layers/heads`` or an ``Arm``; instead of the
            next three.
        policy, layers, heads: which tokens stay, how many per layer, how many per KV head: names,
            ``"name(key=value)"``, objects or classes, also your own.
        dtype: of the cache: a torch dtype, ``float32``, ``bfloat16``, ``float16``, or ``auto``: the
            model's own.
        trust_remote_code: run code that comes with the model to read its configuration.
        settings: interval, window, n_sink, prompt, profile and others of ``CompressionConfig``.

    Returns:
        The plan: ``show()`` prints it, ``memory(batch).kv_bytes(tokens)`` is exact.

    Raises:
        UsageError: a wrong argument, a model that cannot be found, a broken or foreign file.
        UnsupportedError: a model that cannot run under a budget, with the reason.
    """
    chosen = choose_arm(arm, policy, layers, heads)
    unknown = settings.keys() - CompressionConfig.__dataclass_fields__.keys()
    if unknown:
        raise TypeError(f"plan() got an unexpected keyword argument {min(unknown)!r}")
    config = CompressionConfig(budget=cast("int", budget), arm=chosen, **settings)
    name = None
    if isinstance(model, str | os.PathLike):
        from reasonalloc.loading import load_config

        name = os.fspath(model)
        model = load_config(name, trust_remote_code)
    return plan_config(model, config, batch, tokens, dtype, name, prompt_tokens)


def plan_config(
    model: Any,
    config: CompressionConfig,
    batch: int = 1,
    tokens: int = TOKENS,
    dtype: str | torch.dtype = "auto",
    name: str | None = None,
    prompt_tokens: int = 0,
) -> BudgetPlan:
    """Return what ``plan`` does of settings; ``model`` has a configuration or is one."""
    from reasonalloc.loading import resolve_dtype

    name = model_name(model) if name is None else name
    own, text = getattr(model, "dtype", None), text_config(model)
    if dtype == "auto" and isinstance(own, torch.dtype):
        dtype = own
    return BudgetPlan(
        config,
        layer_shapes(text, name),
        text,
        name,
        batch=batch,
        tokens=tokens,
        dtype=resolve_dtype(dtype, getattr(model, "config", model)),
        prompt_tokens=prompt_tokens,
    )
