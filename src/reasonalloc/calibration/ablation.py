"""What holding one KV head, or one layer, to a few tokens costs, measured one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reasonalloc.calibrated.costs import CostProfile
from reasonalloc.calibrated.objectives import CalibrationConfig
from reasonalloc.calibration.checks import (
    Checked,
    Estimate,
    checked,
    cost_profile,
    counter,
    now,
    to_be_fitted,
)
from reasonalloc.calibration.layer_replay import outputs_under_budgets
from reasonalloc.calibration.observe import fingerprint
from reasonalloc.calibration.suffix import SuffixRunner
from reasonalloc.config import CompressionConfig, Prompt
from reasonalloc.errors import UsageError
from reasonalloc.integrations.hf.model import inner_model
from reasonalloc.planning.shapes import text_config
from reasonalloc.texts import Trajectory
from reasonalloc.whole import whole_number

BUDGETS = (24, 48, 96, 192)
#: Activations and logits of one batch of ablations, roughly.
_BATCH_BYTES = 1 << 29
#: Most that rounding may add to the mean KL of a run in which nothing is changed: in 32 and in 16
#: bits.
_ROUNDING, _ROUNDING_HALF = 1e-5, 1e-3


@dataclass(frozen=True)
class _Text:
    """A text as it is measured: ids [1, n], length of the prompt, measured positions [m]."""

    ids: Tensor
    prompt: int
    positions: Tensor


@torch.no_grad()
def ablation(
    model: Any,
    texts: Sequence[Trajectory],
    *,
    kinds: Sequence[str] | None = None,
    policy: str = "rkv",
    budgets: Sequence[int] = BUDGETS,
    interval: int = CompressionConfig.interval,
    window: int = CompressionConfig.window,
    prompt: Prompt = CompressionConfig.prompt,
    stride: int = CalibrationConfig.stride,
    on_progress: Callable[[int, int], None] | None = None,
) -> CostProfile:
    """Measure KL(full || compressed) with one KV head, or one layer, compressed at a time.

    See docs/method.md, "Costs of heads".

    Args:
        model: a decoder-only transformers model in evaluation mode, not attached to anything.
        texts: with completions; of no test set.
        kinds: a label per text, or None.
        policy: which tokens a head keeps.
        budgets: tokens per head, at least two, rising.
        interval, window: the cadence, in tokens.
        prompt: ``evict`` or ``pin``: with the latter budgets are those of generated tokens.
        stride: measure every so many completion tokens, from a start that depends on the text.
        on_progress: called with finished and all (text, layer) pairs, after each.

    Returns:
        The cost profile, objective ``kl``.

    Raises:
        UsageError: a wrong argument.
        UnsupportedError: a model that cannot run under a budget.
    """
    model = inner_model(model)
    settings = checked(model, texts, kinds, [policy], budgets, interval, window, prompt=prompt)
    if to_be_fitted(settings.policies[0]):
        raise UsageError(
            f"policy={policy!r} is fitted to gradients, which objective='kl' has none of: use "
            "objective='fisher', or name a cost profile that has it: predicted_loss(path=FILE)"
        )
    stride = whole_number("stride", stride, 1)
    advance = counter(on_progress, len(texts) * len(settings.layers))
    costs: list[list[list[list[float]]]] = []
    tokens: list[int] = []
    with SuffixRunner(model, settings.layers) as runner:
        for index, trajectory in enumerate(texts):
            text = _prepared(model, trajectory, stride)
            full = runner.full(text.ids, text.positions)[0].float().log_softmax(-1)
            if index == 0 and runner.resumes:
                runner.resumes = _resumes(runner, text, full, model.dtype)
            costs.append(_text_costs(model, runner, text, full, settings, advance))
            tokens.append(len(text.positions))
    return cost_profile(
        model,
        "kl",
        texts,
        kinds,
        settings.configs[0],
        samples=0,
        budgets=settings.budgets,
        tokens=tokens,
        costs=[[heads for *heads, _ in layers] for layers in costs],
        layer_costs=[[whole for *_, whole in layers] for layers in costs],
    )


def _text_costs(
    model: Any,
    runner: SuffixRunner,
    text: _Text,
    full: Tensor,
    settings: Checked,
    advance: Callable[[], None],
) -> list[list[list[float]]]:
    """Return [layers][kv_heads + 1][budgets] nats per token, after the full pass."""
    costs = []
    config, policy = settings.configs[0], settings.policies[0]
    for layer in settings.layers:
        seen = runner.seen[layer]
        rows = outputs_under_budgets(seen, text.prompt, config, policy, settings.budgets)
        costs.append(_costs(model, runner, text, full, layer, rows))
        advance()
    return costs


@torch.no_grad()
def estimate(
    model: Any,
    texts: Sequence[Trajectory],
    *,
    policy: str = "rkv",
    budgets: Sequence[int] = BUDGETS,
    interval: int = CompressionConfig.interval,
    window: int = CompressionConfig.window,
    prompt: Prompt = CompressionConfig.prompt,
    stride: int = CalibrationConfig.stride,
) -> Estimate:
    """Return what ``ablation`` will take, from two timed passes over the first text.

    Arguments and errors are those of ``ablation``.
    """
    model = inner_model(model)
    settings = checked(model, texts, None, [policy], budgets, interval, window, prompt=prompt)
    stride = whole_number("stride", stride, 1)
    layers = settings.layers
    text = _prepared(model, texts[0], stride)
    with SuffixRunner(model, layers) as runner:
        runner.full(text.ids, text.positions)  # the first pass is slower
        whole = _seconds(lambda: runner.full(text.ids, text.positions), model)
        output = runner.seen[layers[-1]].output
        least = _seconds(lambda: runner.run(text.ids, text.positions, layers[-1], output), model)
    each = [len(settings.budgets) * (heads + 1) for heads in settings.kv_heads]
    count = sum(len(t.prompt_ids) + len(t.completion_ids) - 1 for t in texts)
    # Between a pass through all layers and one through the last: linear in the layers that run.
    depth = [1 - layer / max(layers[-1], 1) for layer in layers]
    passes = sum(
        runs * (least + (whole - least) * share) for runs, share in zip(each, depth, strict=True)
    )
    return Estimate(
        forward_tokens=sum(each) * count,
        seconds=passes * count / text.ids.shape[1],
    )


def _prepared(model: Any, text: Trajectory, stride: int) -> _Text:
    ids = torch.tensor(
        [text.prompt_ids + text.completion_ids[:-1]], dtype=torch.int64, device=model.device
    )
    first, end = len(text.prompt_ids), ids.shape[1]
    # A start of its own for every text: places just after a boundary and just before one then
    # take part alike.
    start = first + int(fingerprint(ids), 16) % min(stride, end - first)
    return _Text(ids, first, torch.arange(start, end, stride, device=ids.device))


def _costs(
    model: Any,
    runner: SuffixRunner,
    text: _Text,
    full: Tensor,
    layer: int,
    rows: Sequence[Tensor | None],
) -> list[list[float]]:
    """Return the mean KL of one layer, [kv_heads + 1][budgets]: of each head, then of all of them.

    Several ablations run as one batch.
    """
    output, heads = runner.seen[layer].output, runner.seen[layer].kv_heads
    group = output.shape[2] // heads
    parts = [slice(head * group, (head + 1) * group) for head in range(heads)] + [slice(None)]
    jobs = [(i, p) for i in range(len(parts)) for p in range(len(rows)) if rows[p] is not None]
    costs = [[0.0] * len(rows) for _ in parts]
    size = max(1, _BATCH_BYTES // _row_bytes(model, text))
    for first in range(0, len(jobs), size):
        batch = jobs[first : first + size]
        outputs = output.repeat(len(batch), 1, 1, 1)
        for row, (index, point) in enumerate(batch):
            part, replaced = parts[index], rows[point]
            if replaced is not None:
                outputs[row, :, part] = replaced[:, part]
        logits = runner.run(text.ids, text.positions, layer, outputs)
        for (index, point), ablated in zip(batch, logits, strict=True):
            costs[index][point] = _kl(full, ablated)
    return costs


def _kl(full: Tensor, logits: Tensor) -> float:
    """Return the mean KL per position; both [m, vocabulary], ``full`` log-probabilities."""
    ours = logits.float().log_softmax(-1)
    each = F.kl_div(ours, full, reduction="none", log_target=True).sum(-1)
    return float(each.clamp_min(0).double().mean())


def _row_bytes(model: Any, text: _Text) -> int:
    """Return the bytes of one ablation: a layer's activations, and logits in three forms."""
    config = text_config(model)
    inner = getattr(config, "intermediate_size", None) or 0
    width = 8 * config.hidden_size + 3 * (max(inner) if isinstance(inner, list) else inner)
    numbers: int = text.ids.shape[1] * width
    logits: int = len(text.positions) * config.vocab_size
    itemsize: int = model.dtype.itemsize
    return numbers * itemsize + logits * (itemsize + 8)


def _resumes(runner: SuffixRunner, text: _Text, full: Tensor, dtype: torch.dtype) -> bool:
    """Whether runs from the middle and from the last layer on equal the full pass."""
    limit = _ROUNDING if dtype.itemsize >= 4 else _ROUNDING_HALF
    for layer in (runner.layers[len(runner.layers) // 2], runner.layers[-1]):
        logits = runner.run(text.ids, text.positions, layer, runner.seen[layer].output)
        if not _kl(full, logits[0]) < limit:
            return False
    return True


def _seconds(run: Callable[[], Tensor], model: Any) -> float:
    start = now(model)
    run()
    return now(model) - start
