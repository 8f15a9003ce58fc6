"""What measurements of costs share: arguments, checked; what they will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch

from reasonalloc.calibrated import CostProfile
from reasonalloc.calibrated.demand import config_hash
from reasonalloc.calibration.observe import check_mode, fingerprint
from reasonalloc.config import Arm, CompressionConfig, Prompt
from reasonalloc.core.cadence import compression_points
from reasonalloc.errors import UsageError
from reasonalloc.integrations.hf.model import check_model
from reasonalloc.integrations.hf.projection import output_metrics
from reasonalloc.integrations.hf.replay import check_text
from reasonalloc.integrations.hf.rope import read_rope
from reasonalloc.planning.budget import BudgetPlan
from reasonalloc.planning.memory import LayerShape
from reasonalloc.planning.shapes import model_name, text_config
from reasonalloc.policies import POLICIES, Policy
from reasonalloc.policies.calibrated import Calibrated
from reasonalloc.policies.predicted_loss import PredictedLoss
from reasonalloc.texts import Trajectory
from reasonalloc.whole import whole_numbers


@dataclass(frozen=True)
class Estimate:
    """What a measurement will take.

    Attributes:
        forward_tokens: tokens fed to the model over all passes, forwards and backwards, through
            all of its layers or some.
        seconds: of those passes, from timed ones.
    """

    forward_tokens: int
    seconds: float


@dataclass(frozen=True)
class Checked:
    """Arguments that can work together.

    Attributes:
        budgets: tokens per head, plain ints, rising.
        layers: indices of the layers under a budget.
        kv_heads: KV heads of each of them.
        configs: per policy, the settings of a run with equal budgets, the first of ``budgets``.
        policies: the same, bound to the model.
    """

    budgets: list[int]
    layers: list[int]
    kv_heads: list[int]
    configs: list[CompressionConfig]
    policies: list[Policy]


def checked(
    model: Any,
    texts: Sequence[Trajectory],
    kinds: Sequence[str] | None,
    policies: Sequence[str],
    budgets: Sequence[int],
    interval: int,
    window: int,
    seed: int = 0,
    prompt: Prompt = "evict",
) -> Checked:
    """Refuse what cannot work before anything is measured.

    Raises:
        UsageError: a wrong argument; names it.
        UnsupportedError: a model that cannot run under a budget.
    """
    shapes = check_model(model)
    _check_texts(model, texts, kinds)
    budgets = whole_numbers("budgets", budgets)
    if len(budgets) < 2 or sorted(set(budgets)) != budgets:
        raise UsageError(f"budgets={budgets} must be at least two whole numbers, rising")
    _check_policies(policies)
    configs = [
        CompressionConfig(
            budget=budgets[0],
            arm=Arm(policy),
            interval=interval,
            window=window,
            seed=seed,
            prompt=prompt,
        )
        for policy in policies
    ]
    if prompt == "protect":
        raise UsageError(
            "prompt='protect': the smallest budgets would not hold the prompts: evict or pin"
        )
    if not any(evicts(text, budgets[0], interval, prompt) for text in texts):
        raise UsageError(
            f"budgets={budgets}: even the smallest holds every text up to its last boundary, "
            "so nothing would be measured: give smaller budgets or longer texts"
        )
    layers = [i for i, shape in enumerate(shapes) if shape.compressible]
    return Checked(
        budgets=budgets,
        layers=layers,
        kv_heads=[shapes[layer].kv_heads for layer in layers],
        configs=configs,
        policies=[_bound(model, config, shapes) for config in configs],
    )


def _check_texts(model: Any, texts: Sequence[Trajectory], kinds: Sequence[str] | None) -> None:
    check_mode(model)
    if not texts:
        raise UsageError("texts: none given, at least one is needed")
    if kinds is not None and len(kinds) != len(texts):
        raise UsageError(f"kinds: {len(kinds)} labels for {len(texts)} texts: give one per text")
    for index, text in enumerate(texts):
        if not text.prompt_ids or len(text.completion_ids) < 2:
            raise UsageError(f"text {index} needs a prompt and at least two completion tokens")
        check_text(model, text)


def _check_policies(policies: Sequence[str]) -> None:
    if not policies:
        raise UsageError("policies: none given, at least one is needed")
    for policy in policies:
        if list(policies).count(policy) > 1:
            raise UsageError(f"policy={policy!r} is given twice: name each policy once")
        part = POLICIES.create(policy)
        if isinstance(part, Calibrated):
            raise UsageError(
                f"policy={policy!r} takes its policy from a cost profile, which is to be made: "
                "name a policy of its own, as rkv"
            )


def check_formats(model: Any, formats: Sequence[str], settings: Checked) -> None:
    """Refuse formats that the model's keys and values cannot be kept in.

    Raises:
        UnsupportedError, UsageError: names the format, and says why.
    """
    for kind in formats:
        config = replace(settings.configs[0], arm=Arm("rkv"), kv_dtype=kind)
        BudgetPlan(config, check_model(model), text_config(model), model_name(model))


def to_be_fitted(policy: Policy) -> TypeGuard[PredictedLoss]:
    """Whether calibration has to fit a policy: it foretells, and names no file to read."""
    return isinstance(policy, PredictedLoss) and not policy.path


def _bound(model: Any, config: CompressionConfig, shapes: tuple[LayerShape, ...]) -> Policy:
    """Return a policy, bound to the model unless what it reads is yet to be made."""
    policy = POLICIES.create(config.arm.policy)
    if to_be_fitted(policy):
        return policy
    plan = BudgetPlan(
        config,
        shapes,
        text_config(model),
        model_name(model),
        load_rope=lambda: read_rope(model),
        load_output_metrics=lambda: output_metrics(model),
    )
    return plan.policy


def cost_profile(
    model: Any,
    objective: str,
    texts: Sequence[Trajectory],
    kinds: Sequence[str] | None,
    config: CompressionConfig,
    **measured: Any,
) -> CostProfile:
    """Return what was measured of a policy as a cost profile.

    Args:
        model, texts, kinds: as for ``checked``.
        objective: how it was measured.
        config: policy, cadence and what happens to prompts.
        measured: the other fields of ``CostProfile``.
    """
    tokens = [[*text.prompt_ids, *text.completion_ids] for text in texts]
    return CostProfile(
        objective=objective,
        model_id=model_name(model),
        config_hash=config_hash(text_config(model).to_dict()),
        policy=config.arm.policy,
        interval=config.interval,
        window=config.window,
        prompt="pin" if config.prompt == "pin" else "evict",
        text_hashes=[
            fingerprint(torch.tensor([ids], dtype=torch.int64, device="cpu")) for ids in tokens
        ],
        kinds=[""] * len(texts) if kinds is None else list(kinds),
        **measured,
    )


def counter(on_progress: Callable[[int, int], None] | None, total: int) -> Callable[[], None]:
    """Return what counts a finished step of ``total`` when it is called."""
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    return advance


def evicts(text: Trajectory, budget: int, interval: int, prompt: Prompt) -> bool:
    """Whether a text loses tokens at a budget per head, and any token comes after that."""
    tokens, steps = len(text.prompt_ids), len(text.completion_ids) - 2
    pinned = pinned_tokens(text, prompt)
    return bool(compression_points(budget, 1, interval, tokens, steps, pinned))


def pinned_tokens(text: Trajectory, prompt: Prompt) -> int:
    """Return how many tokens of a text stay on top of a measured budget."""
    return len(text.prompt_ids) if prompt == "pin" else 0


def now(model: Any) -> float:
    """Return seconds on a clock, read once the model's device has finished its work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
