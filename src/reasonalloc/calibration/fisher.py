"""Costs of compressing each head alone, to second order: a few backward passes for all of them.

Holding a head to a budget moves its output at token ``t`` by ``d_t``. To second order the KL
divergence of the final distributions is ``1/2 d^T F d`` with the Fisher information ``F`` of the
outputs. A backward pass from random logits-space vectors ``B e`` (``B B^T = diag(p) - p p^T``,
``e`` standard normal) gives ``g`` with ``E[g g^T] = F``, for all heads at once, so that the cost is
the mean of ``1/2 sum_t (g_t . d_t)^2``. Errors of different tokens are taken as uncorrelated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reasonalloc.calibrated.costs import CostProfile
from reasonalloc.calibrated.objectives import CalibrationConfig
from reasonalloc.calibrated.predictor import FEATURES, Predictor, as_json
from reasonalloc.calibration.checks import (
    Checked,
    Estimate,
    check_formats,
    checked,
    cost_profile,
    counter,
    now,
    to_be_fitted,
)
from reasonalloc.calibration.layer_replay import outputs_under_budgets
from reasonalloc.calibration.predictor import Examples, texts_to_fit, with_predictor
from reasonalloc.config import CompressionConfig, Prompt
from reasonalloc.core.watched import Seen, join_outputs
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.integrations.hf.model import inner_model
from reasonalloc.integrations.hf.watched import Watched, watching
from reasonalloc.kinds import is_coded
from reasonalloc.texts import Trajectory
from reasonalloc.whole import whole_number

POLICIES = ("predicted_loss", "rkv")
BUDGETS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384)


class _Tape:
    """Keeps what every layer saw, its output in the graph; runs the model while it is open."""

    def __init__(self, layers: Sequence[int], watched: Watched) -> None:
        self.layers = tuple(layers)
        self.watched = watched
        self.seen: dict[int, Seen] = {}

    def show(self, seen: Seen) -> None:
        """Take what a layer saw."""
        self.seen[seen.layer] = seen


def fisher(
    model: Any,
    texts: Sequence[Trajectory],
    *,
    kinds: Sequence[str] | None = None,
    policies: Sequence[str] = POLICIES,
    budgets: Sequence[int] = BUDGETS,
    interval: int = CompressionConfig.interval,
    window: int = CompressionConfig.window,
    prompt: Prompt = CompressionConfig.prompt,
    samples: int = CalibrationConfig.samples,
    kv_dtypes: Sequence[str] = ("auto",),
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
        prompt: ``evict`` or ``pin``: with the latter budgets are those of generated tokens.
        samples: backward passes per text.
        kv_dtypes: formats of older tokens to measure at each budget besides ``auto``.
        seed: of the random vectors, and of the policy ``random``.
        on_progress: called with steps done and steps in all; a step is a text's backward pass or
            one of its layers under one policy and in one format.

    Returns:
        One profile per policy: costs in nats per completion token (without the first, which
        nothing can change).

    Raises:
        UsageError: a wrong argument.
        UnsupportedError: a model that cannot run under a budget.
    """
    model = inner_model(model)
    settings = checked(model, texts, kinds, policies, budgets, interval, window, seed, prompt)
    samples = whole_number("samples", samples, 1)
    formats = read_formats(kv_dtypes)
    check_formats(model, formats, settings)
    foretold = texts_to_fit(settings.policies, texts)
    steps = samples + len(settings.layers) * len(settings.policies) * (1 + len(formats))
    fits = len(foretold) * (samples + len(settings.layers))
    advance = counter(on_progress, len(texts) * steps + fits)
    generator = torch.Generator(device=model.device).manual_seed(settings.configs[0].seed)
    costs: list[list[list[list[Tensor]]]] = []
    with _taping(model, settings.layers) as tape:
        predictor = _fit(tape, foretold, samples, generator, settings, advance)
        settings = replace(settings, policies=with_predictor(settings.policies, predictor))
        for text in texts:
            gradients = _gradients(tape, text, samples, generator, advance)
            costs.append(_text_costs(tape, text, gradients, settings, formats, advance))
    return [
        cost_profile(
            model,
            "fisher",
            texts,
            kinds,
            config,
            samples=samples,
            budgets=settings.budgets,
            tokens=[len(text.completion_ids) - 1 for text in texts],
            **_as_lists([policies[number][0] for policies in costs]),
            coded={
                kind: _as_lists([policies[number][place] for policies in costs])
                for place, kind in enumerate(formats, 1)
            },
            foretells=as_json(predictor) if to_be_fitted(settings.policies[number]) else None,
        )
        for number, config in enumerate(settings.configs)
    ]


def _fit(
    tape: _Tape,
    texts: Sequence[Trajectory],
    samples: int,
    generator: torch.Generator,
    settings: Checked,
    advance: Callable[[], None],
) -> Predictor | None:
    """Return what foretells the loss of a token; None without texts."""
    if not texts:
        return None
    config = settings.configs[0]
    sinks = max(policy.sinks for policy in settings.policies if to_be_fitted(policy))
    examples = Examples(settings.layers)
    for text in texts:
        gradients = _gradients(tape, text, samples, generator, advance)
        for layer, directions in zip(settings.layers, gradients, strict=True):
            examples.add(tape.seen.pop(layer), directions, text, config, sinks)
            advance()
    predictor = examples.fit()
    if predictor is None:
        raise UsageError(
            "policy='predicted_loss': no text has a boundary with tokens that compete before it "
            f"and {config.interval} after it (the interval), so nothing can be foretold: give "
            "longer texts, or name another policy"
        )
    return predictor


def _text_costs(
    tape: _Tape,
    text: Trajectory,
    gradients: Sequence[Tensor],
    settings: Checked,
    formats: Sequence[str],
    advance: Callable[[], None],
) -> list[list[list[Tensor]]]:
    """Return [kv_heads + 1, budgets] nats per token, by policy, plain and coded, and layer."""
    tokens, prompt = len(text.completion_ids) - 1, len(text.prompt_ids)
    kinds = ("auto", *formats)
    rows: list[list[list[Tensor]]] = [[[] for _ in kinds] for _ in settings.policies]
    for layer, directions in zip(settings.layers, gradients, strict=True):
        seen = tape.seen.pop(layer)
        for config, policy, own in zip(settings.configs, settings.policies, rows, strict=True):
            for kind, row in zip(kinds, own, strict=True):
                coded = replace(config, kv_dtype=kind)
                outputs = outputs_under_budgets(seen, prompt, coded, policy, settings.budgets)
                row.append(_cost(outputs, seen, directions) / tokens)
                advance()
    return rows


def read_formats(kv_dtypes: Sequence[str]) -> list[str]:
    """Return the formats in fewer bits among ``kv_dtypes``, none twice.

    Raises:
        UsageError: an unknown format, or text instead of several.
    """
    if isinstance(kv_dtypes, str) or not isinstance(kv_dtypes, Sequence):
        raise UsageError(f"kv_dtypes={kv_dtypes!r} must be a list of formats")
    kinds = list(dict.fromkeys(kv_dtypes))
    return [kind for kind in kinds if is_coded(kind)]


def _as_lists(costs: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
    """Return the costs of heads and of layers, of [kv_heads + 1, budgets] per text and layer."""
    return {
        "costs": [[layer[:-1].tolist() for layer in text] for text in costs],
        "layer_costs": [[layer[-1].tolist() for layer in text] for text in costs],
    }


def estimate(
    model: Any,
    texts: Sequence[Trajectory],
    *,
    policies: Sequence[str] = POLICIES,
    budgets: Sequence[int] = BUDGETS,
    interval: int = CompressionConfig.interval,
    window: int = CompressionConfig.window,
    prompt: Prompt = CompressionConfig.prompt,
    samples: int = CalibrationConfig.samples,
    kv_dtypes: Sequence[str] = ("auto",),
) -> Estimate:
    """Return what ``fisher`` will take, from two passes and one layer of the first text.

    Arguments and errors are those of ``fisher``.
    """
    model = inner_model(model)
    settings = checked(model, texts, None, policies, budgets, interval, window, prompt=prompt)
    samples = whole_number("samples", samples, 1)
    check_formats(model, read_formats(kv_dtypes), settings)
    generator = torch.Generator(device=model.device).manual_seed(0)
    text, layers = texts[0], settings.layers
    with _taping(model, layers) as tape:
        start = now(model)
        first: list[float] = []
        _gradients(tape, text, 2, generator, lambda: first.append(now(model)))
        forward, backward = first[0] - start, first[1] - first[0]
        start = now(model)
        # Any weights take the same time.
        zeros = [[[0.0] * len(FEATURES)] * heads for heads in settings.kv_heads]
        ready = with_predictor(settings.policies, Predictor(layers, zeros))
        for own, policy in zip(settings.configs, ready, strict=True):
            seen, prompt_tokens = tape.seen[layers[-1]], len(text.prompt_ids)
            for kind in ("auto", *read_formats(kv_dtypes)):
                coded = replace(own, kv_dtype=kind)
                outputs_under_budgets(seen, prompt_tokens, coded, policy, settings.budgets)
        replay = now(model) - start
    measured, timed = _tokens(texts), _tokens(texts[:1])
    through = measured + _tokens(texts_to_fit(settings.policies, texts))
    passes = forward + (samples - 1) * backward
    seconds = (passes * through + len(layers) * replay * measured) / timed
    return Estimate(forward_tokens=through * (1 + samples), seconds=seconds)


def _tokens(texts: Sequence[Trajectory]) -> int:
    """Return the tokens that the model is fed in a pass over each text."""
    return sum(len(text.prompt_ids) + len(text.completion_ids) - 1 for text in texts)


@contextmanager
def _taping(model: Any, layers: Sequence[int]) -> Iterator[_Tape]:
    """Inside, attention is taped, and gradients flow from the embeddings, not into weights."""
    learning = [p for p in model.parameters() if p.requires_grad]
    tape: list[_Tape] = []
    with watching(model, lambda seen: tape[0].show(seen)) as watched:
        tape.append(_Tape(layers, watched))
        hook = model.get_input_embeddings().register_forward_hook(
            lambda module, arguments, out: out.detach().requires_grad_(True).clone()
        )
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            yield tape[0]
        finally:
            hook.remove()
            for parameter in learning:
                parameter.requires_grad_(True)


def _gradients(
    tape: _Tape,
    trajectory: Trajectory,
    samples: int,
    generator: torch.Generator,
    advance: Callable[[], None],
) -> list[Tensor]:
    """Return random roots of the Fisher matrix, [samples, tokens, query_heads, value_dim] each."""
    tokens = (*trajectory.prompt_ids, *trajectory.completion_ids[:-1])
    with torch.inference_mode(False), torch.enable_grad():
        ids = torch.tensor([tokens], dtype=torch.int64, device=generator.device)
        predicted = torch.arange(len(trajectory.prompt_ids), len(tokens), device=ids.device)
        logits = tape.watched.logits(ids, predicted)[0].float()
        probability = logits.detach().softmax(dim=-1)
        root = probability.sqrt()
        seen = [tape.seen[layer] for layer in tape.layers]
        outputs = [part for one in seen for part in one.parts]
        _check_recorded(tape)
        directions = []
        for sample in range(samples):
            noise = torch.randn(
                root.shape, generator=generator, device=root.device, dtype=root.dtype
            ).mul_(root)
            noise -= probability * noise.sum(dim=-1, keepdim=True)
            keep = sample < samples - 1
            grads = torch.autograd.grad(
                logits, outputs, noise, keep, allow_unused=True, materialize_grads=True
            )
            rest = iter(grads)
            directions.append(
                [
                    join_outputs([next(rest) for _ in one.parts], one.kv_heads)[0].float()
                    for one in seen
                ]
            )
            advance()
    return [torch.stack(parts) for parts in zip(*directions, strict=True)]


def _check_recorded(tape: _Tape) -> None:
    """Refuse a model that runs layers without recording what gradients need."""
    for layer in tape.layers:
        if not all(part.requires_grad for part in tape.seen[layer].parts):
            raise UnsupportedError(
                f"objective='fisher' needs gradients, which layer {layer} of the model runs "
                "without: use objective='kl'"
            )


def _cost(rows: Sequence[Tensor | None], seen: Seen, directions: Tensor) -> Tensor:
    """Return the summed cost of each head and of all of them: [kv_heads + 1, budgets].

    Args:
        rows: per budget [tokens, query_heads, value_dim], or None where nothing is evicted.
        seen: the layer in the full pass.
        directions: [samples, tokens, query_heads, value_dim].
    """
    full, kv_heads = seen.output[0], seen.kv_heads
    costs = torch.zeros(kv_heads + 1, len(rows), dtype=torch.float32, device=full.device)
    for point, row in enumerate(rows):
        if row is not None:
            products = torch.einsum("thd,sthd->sth", (row - full).float(), directions)
            grouped = products.unflatten(-1, (kv_heads, -1)).sum(dim=-1)
            together = torch.cat([grouped, grouped.sum(dim=-1, keepdim=True)], dim=-1)
            costs[:, point] = together.pow(2).sum(dim=1).mean(dim=0) / 2
    return costs
