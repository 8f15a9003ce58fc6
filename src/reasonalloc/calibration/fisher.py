"""Costs of compressing each head alone, to second order: a few backward passes for all of them.

Holding a head to a budget moves its output at token ``t`` by ``d_t``. To second order the KL
divergence of the final distributions is ``1/2 d^T F d`` with the Fisher information ``F`` of the
outputs. A backward pass from random logits-space vectors ``B e`` (``B B^T = diag(p) - p p^T``,
``e`` standard normal) gives ``g`` with ``E[g g^T] = F``, for all heads at once, so that the cost is
the mean of ``1/2 sum_t (g_t . d_t)^2``. Errors of different tokens are taken as uncorrelated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from reasonalloc.calibration.layer_replay import LayerInputs, outputs_under_budgets
from reasonalloc.config import Arm, CompressionConfig
from reasonalloc.costs import CostProfile
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.trajectories import Trajectory
from reasonalloc.integrations.hf.attention import attention_forward, mask_forward
from reasonalloc.integrations.hf.model import check_model, text_config
from reasonalloc.integrations.hf.rope import read_rope
from reasonalloc.planning import bound_policy
from reasonalloc.profiles import config_hash

_IMPLEMENTATION = "reasonalloc-fisher"
POLICIES_TO_TRY = ("value_aware", "rkv")
BUDGETS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384)


class _Tape:
    """Attention function that keeps every layer's inputs and its output, in the graph."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = set(layers)
        self.inputs: dict[int, LayerInputs] = {}
        self.outputs: dict[int, Tensor] = {}

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        out, extra = attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, **kwargs
        )
        layer = module.layer_idx
        if layer in self._layers:
            self.inputs[layer] = LayerInputs(
                layer, query.detach(), key.detach(), value.detach(), scaling, softcap
            )
            self.outputs[layer] = out
        return out, extra


def fisher(
    model: Any,
    texts: Sequence[Trajectory],
    *,
    kinds: Sequence[str] | None = None,
    policies: Sequence[str] = POLICIES_TO_TRY,
    budgets: Sequence[int] = BUDGETS,
    interval: int = 64,
    window: int = 8,
    samples: int = 8,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[CostProfile]:
    """Estimate what holding each KV head to each budget costs, from gradients.

    Args:
        model: a decoder-only transformers model, not attached to anything.
        texts: calibration texts, with completions; of no test set.
        kinds: a label per text, or None.
        policies: which tokens are evicted; all are measured with the same gradients.
        budgets: tokens per head to look at, rising, each at least ``window``.
        interval, window: the cadence to calibrate for.
        samples: backward passes per text.
        seed: of the random vectors, and of the policy ``random``.
        on_progress: called with steps done and steps in all; a step is a text's backward pass or
            one of its layers under one policy.

    Returns:
        One profile per policy: costs in nats per completion token (without the first, which
        nothing can change).

    Raises:
        UsageError: a wrong argument.
        UnsupportedError: a model that cannot run under a budget.
    """
    chosen = checked_budgets(budgets, window)
    if samples < 1:
        raise UsageError(f"samples={samples} must be at least 1")
    if not policies:
        raise UsageError("policies: none given, at least one is needed")
    if not texts:
        raise UsageError("texts: none given, at least one is needed")
    shapes = check_model(model)
    layers = [i for i, shape in enumerate(shapes) if shape.compressible]
    configs = [
        CompressionConfig(
            budget=chosen[0], arm=Arm(policy), interval=interval, window=window, seed=seed
        )
        for policy in policies
    ]
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    text = text_config(model)
    bound = [bound_policy(c, shapes, text, name, lambda: read_rope(model)) for c in configs]
    steps, done = len(texts) * (samples + len(layers) * len(bound)), 0

    def advance() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, steps)

    generator = torch.Generator(device=model.device).manual_seed(seed)
    costs: list[list[list[list[list[float]]]]] = [[] for _ in bound]
    tape = _Tape(layers)
    with _taping(model, tape):
        for trajectory in texts:
            gradients = _gradients(model, tape, trajectory, samples, generator, advance)
            prompt = len(trajectory.prompt_ids)
            tokens = len(trajectory.completion_ids) - 1
            rows: list[list[Tensor]] = [[] for _ in bound]
            for layer, directions in zip(layers, gradients, strict=True):
                inputs, full = tape.inputs.pop(layer), tape.outputs.pop(layer)[0].detach()
                for policy, own, row in zip(bound, configs, rows, strict=True):
                    found = outputs_under_budgets(inputs, prompt, own, policy, chosen)
                    moved = torch.stack([out - full for out in found]).float()
                    row.append(_cost(moved, directions, inputs.key.shape[1]) / tokens)
                    advance()
            for of_policy, row in zip(costs, rows, strict=True):
                of_policy.append(torch.stack(row).tolist())
    return [
        CostProfile(
            objective="fisher",
            model_id=name,
            config_hash=config_hash(text.to_dict()),
            policy=own.arm.policy,
            interval=interval,
            window=window,
            samples=samples,
            budgets=list(chosen),
            text_hashes=[text_hash(trajectory) for trajectory in texts],
            kinds=list(kinds) if kinds is not None else [""] * len(texts),
            tokens=[len(trajectory.completion_ids) - 1 for trajectory in texts],
            costs=of_policy,
        )
        for own, of_policy in zip(configs, costs, strict=True)
    ]


def checked_budgets(budgets: Sequence[int], window: int) -> tuple[int, ...]:
    """Budgets to measure at, rising.

    Raises:
        UsageError: fewer than two, or one that cannot hold the window.
    """
    chosen = tuple(sorted(set(budgets)))
    if len(chosen) < 2 or chosen[0] < window:
        raise UsageError(
            f"budgets={','.join(map(str, budgets))}: give at least two, each at least the window "
            f"({window})"
        )
    return chosen


def text_hash(trajectory: Trajectory) -> str:
    """SHA-256 of a text's token ids."""
    ids = (*trajectory.prompt_ids, *trajectory.completion_ids)
    return hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()


@contextmanager
def _taping(model: Any, tape: _Tape) -> Iterator[None]:
    """Inside, attention is taped, and gradients flow from the embeddings, not into weights."""
    original = text_config(model)._attn_implementation
    AttentionInterface.register(_IMPLEMENTATION, tape)
    AttentionMaskInterface.register(_IMPLEMENTATION, mask_forward)
    learning = [p for p in model.parameters() if p.requires_grad]
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, out: out.detach().requires_grad_(True)
    )
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        model.set_attn_implementation(_IMPLEMENTATION)
        yield
    finally:
        model.set_attn_implementation(original)
        hook.remove()
        for parameter in learning:
            parameter.requires_grad_(True)


def _gradients(
    model: Any,
    tape: _Tape,
    trajectory: Trajectory,
    samples: int,
    generator: torch.Generator,
    advance: Callable[[], None],
) -> list[Tensor]:
    """Per layer, [samples, tokens, query_heads, value_dim]: random roots of the Fisher matrix."""
    ids = torch.tensor([(*trajectory.prompt_ids, *trajectory.completion_ids)], device=model.device)
    first = len(trajectory.prompt_ids)
    with torch.enable_grad():
        logits = model(ids[:, :-1], use_cache=False).logits[0, first:].float()
        probability = logits.detach().softmax(dim=-1)
        root = probability.sqrt()
        leaves = [tape.outputs[layer] for layer in sorted(tape.outputs)]
        found = []
        for sample in range(samples):
            noise = torch.randn(
                root.shape, generator=generator, device=root.device, dtype=root.dtype
            ).mul_(root)
            noise -= probability * noise.sum(dim=-1, keepdim=True)
            grads = torch.autograd.grad(logits, leaves, noise, retain_graph=sample < samples - 1)
            found.append([grad[0].float() for grad in grads])
            advance()
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def _cost(moved: Tensor, directions: Tensor, kv_heads: int) -> Tensor:
    """Summed cost over the text: [kv_heads, budgets].

    Args:
        moved: [budgets, tokens, query_heads, value_dim], change of the outputs.
        directions: [samples, tokens, query_heads, value_dim].
        kv_heads: number of KV heads.
    """
    products = torch.einsum("bthd,sthd->sbth", moved, directions)
    grouped = products.unflatten(-1, (kv_heads, -1)).sum(dim=-1)
    cost: Tensor = grouped.pow(2).sum(dim=2).mean(dim=0).T / 2
    return cost
