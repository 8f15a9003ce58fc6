"""Train the boxed reasoner: ``python -m tools.boxed.train --out runs/boxed``.

A run is a pure function of its options: batches depend on the seed and the step alone, so a run
that was killed goes on from its newest saved state exactly as if nothing had happened. ``--out``
receives the checkpoint for transformers, ``curve.csv`` and ``state.safetensors``.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tools.boxed import attention
from tools.boxed.data import IGNORED, Batch, largest_level, make_batch
from tools.boxed.model import TOKENS, build_config, build_model, save_checkpoint
from tools.boxed.state import load_state, save_state
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW, Muon, Optimizer
from transformers import Qwen3ForCausalLM

from reasonalloc.evaluation.tasks.chain import DIGITS

try:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
except ModuleNotFoundError:
    raise SystemExit("error: training needs rich: pip install 'reasonalloc[cli]'") from None

STATE = "state.safetensors"
CURVE_FIELDS = ("step", "tokens", "variables", "loss", "accuracy", "digits", "rate", "seconds")
_DIGIT_IDS = (TOKENS.index(DIGITS[0]), TOKENS.index(DIGITS[-1]))


@dataclass(frozen=True)
class TrainOptions:
    """Everything that decides the trained weights, and where they go."""

    out: Path
    steps: int = 2000
    seed: int = 0
    device: str = "cpu"
    batch_tokens: int = 4096
    micro_batches: int = 1
    max_variables: int = 64
    muon_rate: float = 0.025
    adam_rate: float = 0.005
    warmup: int = 50
    decay: float = 0.25
    save_every: int = 200
    autocast: bool = True
    init: str | None = None
    stop_after: int | None = None
    quiet: bool = False

    def fingerprint(self) -> str:
        """Return the options that a resumed run must share, as JSON."""
        keep = asdict(self)
        for name in ("out", "device", "save_every", "stop_after", "quiet"):
            del keep[name]
        return json.dumps(keep, sort_keys=True)


def rate_factor(step: int, options: TrainOptions) -> float:
    """Return the learning rate's factor: warm-up, stable, then linear decay to zero."""
    left = (options.steps - step) / max(1.0, options.decay * options.steps)
    return min(1.0, (step + 1) / max(1, options.warmup), left)


def build_optimizers(model: Qwen3ForCausalLM, options: TrainOptions) -> tuple[Muon, AdamW]:
    """Give the hidden matrices to Muon, embeddings and norms to AdamW."""
    named = [item for item in model.named_parameters() if item[1].requires_grad]
    matrices = [item for name, item in named if item.ndim == 2 and "embed" not in name]
    others = [item for name, item in named if item.ndim != 2 or "embed" in name]
    muon = Muon(matrices, lr=options.muon_rate, weight_decay=0.01, momentum=0.95)
    adam = AdamW(others, lr=options.adam_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return muon, adam


def batch_loss(model: Qwen3ForCausalLM, batch: Batch, device: str) -> tuple[Tensor, Tensor]:
    """Return the mean loss over the batch's completions, and where the model's choice is right.

    The second tensor is boolean [N, 2]: right or not, and whether the target is a digit.
    """
    ids, labels = batch.ids.to(device), batch.labels.to(device)
    kept = labels[:, 1:] != IGNORED
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][kept]
    logits = model.lm_head(hidden).float()
    targets = labels[:, 1:][kept]
    loss = functional.cross_entropy(logits, targets)
    digit = (targets >= _DIGIT_IDS[0]) & (targets <= _DIGIT_IDS[1])
    return loss, torch.stack([logits.argmax(-1) == targets, digit], 1)


def train(options: TrainOptions) -> Path:
    """Train, going on from a saved state where there is one; returns the checkpoint's folder."""
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    chunked = options.device == "cpu"
    if chunked:
        attention.register()
    model = build_model(build_config(), options.seed, attention.NAME if chunked else "sdpa")
    if options.init is not None:
        model.load_state_dict(load_file(Path(options.init) / "model.safetensors"), strict=False)
        model.tie_weights()
    nn.Module.to(model, torch.device(options.device)).train()
    optimizers = build_optimizers(model, options)
    curve: list[dict[str, float]] = []
    start, tokens = _resume(options, model, optimizers, curve)
    end = min(options.steps, options.stop_after or options.steps)
    with _progress(options.quiet) as progress:
        task = progress.add_task("training", total=options.steps, completed=start, note="")
        began = time.monotonic()
        for step in range(start, end):
            row = _step(step, options, model, optimizers)
            tokens += int(row["tokens"])
            row["tokens"] = tokens
            row["seconds"] = round(time.monotonic() - began, 1)
            curve.append(row)
            note = f"loss {row['loss']:.3f} accuracy {row['accuracy']:.3f}"
            progress.update(task, advance=1, note=note)
            if (step + 1) % options.save_every == 0 or step + 1 == end:
                _save(options, model, optimizers, curve, step + 1, tokens)
    return options.out


def _step(
    step: int,
    options: TrainOptions,
    model: Qwen3ForCausalLM,
    optimizers: Sequence[Optimizer],
) -> dict[str, float]:
    factor = rate_factor(step, options)
    for optimizer, rate in zip(optimizers, (options.muon_rate, options.adam_rate), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
    largest = largest_level(step / options.steps, options.max_variables)
    total, tokens, variables, hits = 0.0, 0, 0, []
    for part in range(options.micro_batches):
        index = step * options.micro_batches + part
        batch = make_batch(options.seed, index, options.batch_tokens, largest)
        device = torch.device(options.device).type
        with torch.autocast(device, torch.bfloat16, enabled=options.autocast):
            loss, right = batch_loss(model, batch, options.device)
        torch.autograd.backward(loss / options.micro_batches)
        total += loss.item() / options.micro_batches
        tokens += batch.ids.numel()
        variables = max(variables, batch.variables)
        hits.append(right)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seen = torch.cat(hits)
    return {
        "step": step,
        "tokens": tokens,
        "variables": variables,
        "loss": round(total, 5),
        "accuracy": round(seen[:, 0].float().mean().item(), 5),
        "digits": round(seen[seen[:, 1], 0].float().mean().item(), 5),
        "rate": round(factor, 5),
    }


def _resume(
    options: TrainOptions,
    model: Qwen3ForCausalLM,
    optimizers: Sequence[Optimizer],
    curve: list[dict[str, float]],
) -> tuple[int, int]:
    path = options.out / STATE
    if not path.exists():
        return 0, 0
    with safe_open(path, framework="pt") as file:
        saved = json.loads(file.metadata()["json"])["options"]
    if saved != options.fingerprint():
        raise SystemExit(f"{path} was written with other options: {saved}")
    state = load_state(path, model, optimizers, options.device)
    curve.extend(state["curve"])
    return int(state["step"]), int(state["tokens"])


def _save(
    options: TrainOptions,
    model: Qwen3ForCausalLM,
    optimizers: Sequence[Optimizer],
    curve: list[dict[str, float]],
    step: int,
    tokens: int,
) -> None:
    meta = {"options": options.fingerprint(), "step": step, "tokens": tokens, "curve": curve}
    save_state(options.out / STATE, model, optimizers, meta)
    save_checkpoint(model, options.out)
    with (options.out / "curve.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CURVE_FIELDS)
        writer.writeheader()
        writer.writerows(curve)


def _progress(quiet: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        disable=quiet,
    )


def _parse(arguments: Sequence[str] | None) -> TrainOptions:
    defaults = TrainOptions(Path("runs/boxed"))
    parser = argparse.ArgumentParser(prog="tools.boxed.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=defaults.out)
    parser.add_argument("--device", default=defaults.device)
    for name in ("steps", "seed", "batch_tokens", "micro_batches", "max_variables", "warmup"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=int, default=getattr(defaults, name))
    for name in ("muon_rate", "adam_rate", "decay"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=float, default=getattr(defaults, name))
    parser.add_argument("--save-every", type=int, default=defaults.save_every)
    parser.add_argument("--init", default=None, help="folder whose weights to start from")
    parser.add_argument("--stop-after", type=int, default=None, help="stop early, to go on later")
    parser.add_argument("--quiet", action="store_true")
    return TrainOptions(**vars(parser.parse_args(arguments)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    train(_parse(arguments))


if __name__ == "__main__":
    main()
