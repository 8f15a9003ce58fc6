"""A calibration whose inputs are loaded and checked: what it will take, and what it measures."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from reasonalloc.calibrated import CostProfile, DemandProfile
from reasonalloc.calibrated.costs import joint_table
from reasonalloc.calibrated.objectives import (
    OBJECTIVES,
    CalibrationConfig,
)
from reasonalloc.calibrated.statistics import Statistics
from reasonalloc.calibrated.tables import spaced
from reasonalloc.calibration import joint
from reasonalloc.calibration.ablation import ablation
from reasonalloc.calibration.ablation import estimate as estimate_ablation
from reasonalloc.calibration.attention_mass import attention_mass
from reasonalloc.calibration.checks import Estimate
from reasonalloc.calibration.fisher import POLICIES, fisher
from reasonalloc.calibration.fisher import estimate as estimate_fisher
from reasonalloc.calibration.statistics import statistics
from reasonalloc.config import split_arms
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.completions import complete_missing, tell_no_end, turn_ends
from reasonalloc.integrations.hf.model import inner_model
from reasonalloc.tables import Table
from reasonalloc.texts import (
    Trajectory,
    as_messages,
    as_trajectory,
    encode_messages,
    load_kinds,
    load_prompts,
    load_trajectories,
)

#: Called with finished and all steps, after each.
OnProgress = Callable[[int, int], None]
Calibrated = DemandProfile | CostProfile | Statistics


@dataclass(frozen=True)
class Measured:
    """What a calibration measured.

    Attributes:
        calibrated: what is kept.
        candidates: cost profiles of all policies, of which the best one is kept; else none.
    """

    calibrated: Calibrated
    candidates: Sequence[CostProfile] = ()

    @property
    def note(self) -> str:
        """What the user should know, or ""."""
        if isinstance(self.calibrated, CostProfile):
            worse = ", ".join(f"{size:.0f}" for size in self.calibrated.no_better())
            return f"At budget {worse} equal budgets measured no worse" if worse else ""
        return "".join(self.calibrated.notes())

    @property
    def use(self) -> str:
        """What uses the file, without its name: options of ``run``, or a command."""
        made = self.calibrated
        if isinstance(made, DemandProfile):
            return "--arm reasonalloc --profile"
        if isinstance(made, CostProfile):
            return "'reasonalloc profile show' or --arm best --profile"
        return f"--arm {'rkv' if made.no_queries else 'tri_attention'}/cake/uniform --profile"

    def summary(self) -> dict[str, Any]:
        """Return the numbers as plain JSON values."""
        made = self.calibrated
        if isinstance(made, Statistics):
            return made.summary()
        if isinstance(made, DemandProfile):
            return {"demand_mean": made.demand_mean}
        return {
            "policy": made.policy,
            "budgets": made.budgets,
            "costs": made.curves(),
            "joint": {profile.policy: profile.joint for profile in self.candidates},
        }

    def tables(self) -> list[Table]:
        """Return what was measured, and how all candidates did in the check."""
        made = self.calibrated
        if isinstance(made, Statistics):
            return made.tables()
        if isinstance(made, DemandProfile):
            prompts = len(made.prompt_hashes)
            title = f"Tokens for {made.rho:.0%} of the attention mass, {prompts} prompts"
            return [made.demand_table(prompts=False, title=title)]
        title = f"KL per token, one head at a budget, 1/1000 nat ({made.policy})"
        tables = [made.cost_table(spaced(made.budgets), title=title)]
        if made.joint:
            title = "KL per token, all heads at once, 1/1000 nat"
            tables.append(joint_table(self.candidates, title))
        return tables


class Job(ABC):
    """A calibration whose inputs are loaded and checked."""

    def announce(self) -> str:
        """Return what the measurement will take, in words, or ""; times some passes."""
        return ""

    @abstractmethod
    def run(self, on_progress: OnProgress) -> Measured:
        """Measure."""


@dataclass(frozen=True)
class _PromptJob(Job):
    """Generations from prompts, token ids [1, n] each."""

    model: Any
    config: CalibrationConfig
    prompts: list[Tensor]

    def run(self, on_progress: OnProgress) -> Measured:
        def on_prompt(index: int) -> None:
            on_progress(index + 1, len(self.prompts))

        options = _options(self.config)
        measure = attention_mass if self.config.objective == "attention-mass" else statistics
        return Measured(measure(self.model, self.prompts, on_prompt=on_prompt, **options))


@dataclass(frozen=True)
class _CostJob(Job):
    """Costs of known texts.

    Attributes:
        policies: candidates; the one that is cheapest in the check is kept.
        check: budgets of the check, or none.
        options: the other options of the measurement, by name.
    """

    model: Any
    config: CalibrationConfig
    texts: list[Trajectory]
    kinds: list[str]
    policies: list[str] = field(init=False)
    check: list[int] = field(init=False)
    options: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        config, named, wanted = self.config, self.config.policy, self.config.check
        own = ("rkv",) if config.objective == "kl" else POLICIES
        policies = list(own) if named is None else split_arms(named)
        if config.objective == "kl" and len(policies) > 1:
            raise UsageError(f"policy={named!r}: --objective kl measures one policy: name one")
        check = (
            joint.budgets_to_check(
                self.texts, wanted, config.interval, config.window, config.prompt
            )
            if wanted is None or len(wanted)
            else []
        )
        options = _options(config)
        for name in ("policy", "check", "generate"):
            del options[name]
        if options["budgets"] is None:
            del options["budgets"]  # the objective's own
        for name, value in (("policies", policies), ("check", check), ("options", options)):
            object.__setattr__(self, name, value)

    def announce(self) -> str:
        estimate, through = self._estimate()
        if not self.check and len(self.policies) > 1:
            raise UsageError(
                f"policy={','.join(self.policies)!r}: which of them is kept is for the check to "
                "say: name one, or give --check a budget that evicts something from the first texts"
            )
        check = joint.estimate(self.model, self.texts, len(self.policies), self.check)
        seconds = estimate.seconds + check.seconds
        text = f"{estimate.forward_tokens:,} tokens will run through {through}, "
        if check.forward_tokens:
            text += f"then {check.forward_tokens:,} to check the costs of all heads together, "
        text += "for about "
        text += f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
        if self.model.dtype.itemsize < 4:
            text += (
                f". In {str(self.model.dtype).removeprefix('torch.')} rounding alone may cost as "
                "much as a head does: --dtype float32 measures better"
            )
        return text

    def _estimate(self) -> tuple[Estimate, str]:
        if self.config.objective == "kl":
            (policy,) = self.policies
            taken = estimate_ablation(self.model, self.texts, policy=policy, **self.options)
            return taken, "parts of the model"
        taken = estimate_fisher(self.model, self.texts, policies=self.policies, **self.options)
        return taken, "the model, forwards and backwards"

    def run(self, on_progress: OnProgress) -> Measured:
        """Measure, check, and keep the cheapest policy."""
        check, steps = joint.steps(self.texts, len(self.policies), self.check), 0

        def advance(done: int, total: int) -> None:
            nonlocal steps
            steps = total
            on_progress(done, total + check)

        def advance_check(done: int, total: int) -> None:
            on_progress(steps + done, steps + total)

        profiles = joint.joint_costs(
            self.model, self.texts, self._measure(advance), self.check, advance_check
        )
        return Measured(joint.cheapest(profiles), profiles)

    def _measure(self, advance: OnProgress) -> list[CostProfile]:
        shared = {"kinds": self.kinds, "on_progress": advance, **self.options}
        if self.config.objective == "kl":
            (policy,) = self.policies
            return [ablation(self.model, self.texts, policy=policy, **shared)]
        return fisher(self.model, self.texts, policies=self.policies, **shared)


def prepare(
    model: Any,
    tokenizer: Any,
    texts: Any,
    config: CalibrationConfig,
    name: str = "texts",
    tell: Callable[[str], None] = lambda _: None,
) -> Job:
    """Load the inputs of a calibration and check its settings.

    Args:
        model, tokenizer, texts: as for ``calibrate``.
        config: the settings.
        name: what messages call the texts.
        tell: is told what has no effect, and if no text has an end of turn.

    Raises:
        UsageError, UnsupportedError: as ``calibrate``.
    """
    model = inner_model(model)
    if not config.chosen.reads_texts:
        return _PromptJob(model, config, _prompts(tokenizer, texts, config.count, name))
    trajectories, kinds = _trajectories(tokenizer, texts, name)
    called = f"{name}={os.fspath(texts)!r}" if isinstance(texts, str | os.PathLike) else name
    complete = complete_missing(model, trajectories[: config.count], config.generate, called, tell)
    tell_no_end(complete, turn_ends(model, tokenizer), tell)
    return _CostJob(model, config, complete, kinds[: config.count])


def _prompts(tokenizer: Any, texts: Any, count: int, name: str) -> list[Tensor]:
    if isinstance(texts, str | os.PathLike):
        return [encode_messages(tokenizer, m) for m in load_prompts(os.fspath(texts), count, name)]
    return [
        text
        if isinstance(text, Tensor)
        else encode_messages(tokenizer, as_messages(text, f"{name}[{index}]"))
        for index, text in enumerate(list(texts)[:count])
    ]


def _trajectories(tokenizer: Any, texts: Any, name: str) -> tuple[list[Trajectory], list[str]]:
    if isinstance(texts, str | os.PathLike):
        path = os.fspath(texts)
        return load_trajectories(path, tokenizer, name), load_kinds(path, name)
    pairs = [as_trajectory(t, tokenizer, f"{name}[{index}]") for index, t in enumerate(texts)]
    return [text for text, _ in pairs], [kind for _, kind in pairs]


def _options(config: CalibrationConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in OBJECTIVES[config.objective].options}
