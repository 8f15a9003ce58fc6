"""What ``reasonalloc calibrate`` can measure: one function per objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from reasonalloc.calibrated.costs import CostProfile
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.arms import split_arms
from reasonalloc.texts import Trajectory

if TYPE_CHECKING:
    from reasonalloc.calibration.checks import Estimate

#: Called with finished and all steps, after each.
OnProgress = Callable[[int, int], None]
#: Texts, and the kind of each.
Texts = tuple[list[Trajectory], list[str]]
#: What objectives that read prompts share, and those that read texts.
_PROMPT_OPTIONS = ("prompts", "max_new_tokens", "every")
_TEXT_OPTIONS = ("texts", "generate", "policy", "budgets", "interval", "window", "check")

#: A title, columns (a title and whether it holds numbers) and rows.
Table = tuple[str, list[tuple[str, bool]], list[tuple[str, ...]]]


@dataclass(frozen=True)
class Measured:
    """A measurement, ready to be written and shown.

    Attributes:
        save: writes the file.
        data: what ``--json`` shows besides the file's name.
        tables: what is printed without ``--json``.
        use: what uses the file, without its name: options of ``run``, or a command.
        note: what the user should know, or "".
    """

    save: Callable[[Path], None]
    data: dict[str, Any]
    tables: list[Table]
    use: str
    note: str = ""


@dataclass(frozen=True)
class Objective:
    """One thing to measure.

    Attributes:
        measure: takes the model, the inputs, ``on_progress`` and the options by name. Inputs are
            the prompts' token ids, or, with the option ``texts``, the texts and their kinds.
        options: options of the command that only some objectives have, and this one has.
        suffix: what the file's name must end with, or "".
        announce: what the measurement will take, in words, from the same arguments; or None.
    """

    measure: Callable[..., Measured]
    options: tuple[str, ...]
    suffix: str = ""
    announce: Callable[..., str] | None = None

    @property
    def reads_texts(self) -> bool:
        """Whether inputs are known texts, not prompts."""
        return "texts" in self.options

    def check_out(self, out: str) -> None:
        """Refuse a name that promises another kind of file."""
        if not out.endswith(self.suffix):
            raise UsageError(f"--out={out!r}: give a name that ends in {self.suffix}")


def _attention_mass(
    model: Any, tokens: list[Tensor], on_progress: OnProgress, **options: Any
) -> Measured:
    from reasonalloc.calibration import attention_mass

    profile = attention_mass(
        model, tokens, on_prompt=lambda index: on_progress(index + 1, len(tokens)), **options
    )
    demands = zip(profile.demand_mean, profile.demand_max, strict=True)
    return Measured(
        save=profile.save,
        data={"demand_mean": profile.demand_mean},
        tables=[
            (
                f"Tokens for {profile.rho:.0%} of the attention mass, {len(tokens)} prompts",
                [("layer", True), ("mean over heads", True), ("largest head", True)],
                [(str(i), f"{mean:.1f}", f"{most:.1f}") for i, (mean, most) in enumerate(demands)],
            )
        ],
        use="--arm reasonalloc --profile",
    )


def _statistics(
    model: Any, tokens: list[Tensor], on_progress: OnProgress, **options: Any
) -> Measured:
    from reasonalloc.calibration import statistics

    found = statistics(
        model, tokens, on_prompt=lambda index: on_progress(index + 1, len(tokens)), **options
    )
    spreads = list(zip(found.layers, found.entropy.tolist(), found.variance.tolist(), strict=True))
    middle = len(found.tops) // 2
    shares = found.top_share[middle].tolist()
    return Measured(
        save=found.save,
        data={
            "layers": found.layers,
            "entropy": found.entropy.tolist(),
            "variance": found.variance.tolist(),
            "top_share": dict(
                zip(map(str, found.tops), found.top_share.tolist(), strict=True),
            ),
            "no_queries": found.no_queries or None,
        },
        tables=[
            (
                f"Window attention of each layer, {len(tokens)} prompts",
                [
                    ("layer", True),
                    ("entropy", True),
                    ("variance", True),
                    (f"share of the top {found.tops[middle]}", True),
                ],
                [
                    (str(layer), f"{entropy:.4g}", f"{variance:.3g}", f"{share:.1%}")
                    for (layer, entropy, variance), share in zip(spreads, shares, strict=True)
                ],
            )
        ],
        use=f"--arm {'rkv/cake/uniform' if found.no_queries else 'tri_attention/cake/uniform'} "
        "--profile",
        note=found.no_queries and f"For cake and dynamickv alone: {found.no_queries}",
    )


def _kl(model: Any, inputs: Texts, on_progress: OnProgress, **options: Any) -> Measured:
    from reasonalloc.calibration import ablation

    texts, kinds = inputs
    job = _cost_job(texts, options, ("rkv",), most=1)

    def measure(advance: OnProgress) -> list[CostProfile]:
        (policy,) = job.policies
        found = ablation(
            model, texts, kinds=kinds, policy=policy, on_progress=advance, **job.options
        )
        return [found]

    return _costs(model, texts, job, measure, on_progress)


def _announce_kl(model: Any, inputs: Texts, **options: Any) -> str:
    from reasonalloc.calibration.ablation import estimate

    job = _cost_job(inputs[0], options, ("rkv",), most=1)
    found = estimate(model, inputs[0], policy=job.policies[0], **job.options)
    return _announce(model, inputs[0], job, found, "parts of the model")


def _fisher(model: Any, inputs: Texts, on_progress: OnProgress, **options: Any) -> Measured:
    from reasonalloc.calibration import fisher
    from reasonalloc.calibration.fisher import POLICIES

    texts, kinds = inputs
    job = _cost_job(texts, options, POLICIES)

    def measure(advance: OnProgress) -> list[CostProfile]:
        return fisher(
            model, texts, kinds=kinds, policies=job.policies, on_progress=advance, **job.options
        )

    return _costs(model, texts, job, measure, on_progress)


def _announce_fisher(model: Any, inputs: Texts, **options: Any) -> str:
    from reasonalloc.calibration.fisher import POLICIES, estimate

    job = _cost_job(inputs[0], options, POLICIES)
    found = estimate(model, inputs[0], policies=job.policies, **job.options)
    return _announce(model, inputs[0], job, found, "the model, forwards and backwards")


@dataclass(frozen=True)
class _CostJob:
    """What an objective of costs was asked to do.

    Attributes:
        policies: candidates; the one that is cheapest in the check is kept.
        check: budgets of the check, or none.
        options: the other options of the measurement, by name.
    """

    policies: list[str]
    check: list[int]
    options: dict[str, Any]


def _cost_job(
    texts: list[Trajectory],
    options: dict[str, Any],
    policies: Sequence[str],
    most: int | None = None,
) -> _CostJob:
    """From the command's options; ``policies`` are measured if none is named, ``most`` at most."""
    from reasonalloc.calibration.joint import budgets_to_check

    others = {name: value for name, value in options.items() if name not in ("policy", "check")}
    named, check = options["policy"], options["check"]
    chosen = list(policies) if named is None else split_arms(named)
    if most is not None and len(chosen) > most:
        raise UsageError(f"policy={named!r}: --objective kl measures one policy: name one")
    if check != []:
        check = budgets_to_check(texts, check, others["interval"], others["window"])
    return _CostJob(chosen, check, others)


def _announce(
    model: Any, texts: list[Trajectory], job: _CostJob, found: Estimate, through: str
) -> str:
    from reasonalloc.calibration.joint import estimate

    if not job.check and len(job.policies) > 1:
        raise UsageError(
            f"policy={','.join(job.policies)!r}: which of them is kept is for the check to say: "
            "name one, or give --check a budget that evicts something from the first texts"
        )
    check = estimate(model, texts, len(job.policies), job.check)
    seconds = found.seconds + check.seconds
    text = f"{found.forward_tokens:,} tokens will run through {through}, "
    if check.forward_tokens:
        text += f"then {check.forward_tokens:,} to check the costs of all heads together, "
    text += "for about "
    text += f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
    if model.dtype.itemsize < 4:
        text += (
            f". In {str(model.dtype).removeprefix('torch.')} rounding alone may cost as much as a "
            "head does: --dtype float32 measures better"
        )
    return text


def _costs(
    model: Any,
    texts: list[Trajectory],
    job: _CostJob,
    measure: Callable[[OnProgress], list[CostProfile]],
    on_progress: OnProgress,
) -> Measured:
    """Measure, check, and keep the cheapest policy: what is shown and written of it."""
    from reasonalloc.calibration import joint
    from reasonalloc.cli.profile_tables import cost_table, joint_table, spaced

    check, steps = joint.steps(texts, len(job.policies), job.check), 0

    def advance(done: int, total: int) -> None:
        nonlocal steps
        steps = total
        on_progress(done, total + check)

    def advance_check(done: int, total: int) -> None:
        on_progress(steps + done, steps + total)

    profiles = joint.joint_costs(model, texts, measure(advance), job.check, advance_check)
    kept = joint.cheapest(profiles)
    title = f"KL per token, one head at a budget, 1/1000 nat ({kept.policy})"
    tables = [(title, *cost_table(kept, spaced(kept.budgets)))]
    if kept.joint:
        title = "KL per token, all heads at once, 1/1000 nat"
        tables.append((title, *joint_table(profiles)))
    # Equal budgets that come from a plan differ from plainly equal ones by rounding.
    margin = 1 - 1e-3
    worse = [f"{e['budget']:.0f}" for e in kept.joint if e["measured"] >= margin * e["uniform"]]
    return Measured(
        save=kept.save,
        data={
            "policy": kept.policy,
            "budgets": kept.budgets,
            "costs": kept.curves(),
            "joint": {profile.policy: profile.joint for profile in profiles},
        },
        tables=tables,
        use="'reasonalloc profile show' or --arm best --profile",
        note=f"At budget {', '.join(worse)} equal budgets measured no worse" if worse else "",
    )


OBJECTIVES = {
    "attention-mass": Objective(_attention_mass, (*_PROMPT_OPTIONS, "rho")),
    "statistics": Objective(_statistics, _PROMPT_OPTIONS, suffix=".safetensors"),
    "kl": Objective(_kl, (*_TEXT_OPTIONS, "stride"), ".json", _announce_kl),
    "fisher": Objective(_fisher, (*_TEXT_OPTIONS, "samples"), ".json", _announce_fisher),
}
