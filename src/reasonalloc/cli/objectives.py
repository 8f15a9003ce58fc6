"""What ``reasonalloc calibrate`` can measure: one function per objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from reasonalloc.costs import CostProfile
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.trajectories import Trajectory

#: Called with finished and all steps, after each.
OnProgress = Callable[[int, int], None]
#: Texts, and the kind of each.
Texts = tuple[list[Trajectory], list[str]]
#: What objectives that read prompts share, and those that read texts.
_PROMPT_OPTIONS = ("prompts", "max_new_tokens", "every")
_TEXT_OPTIONS = ("texts", "generate", "policy", "budgets", "interval", "window")


@dataclass(frozen=True)
class Measured:
    """A measurement, ready to be written and shown.

    Attributes:
        save: writes the file.
        data: what ``--json`` shows besides the file's name.
        title, columns, rows: the table; a column is a title and whether it holds numbers.
        use: what uses the file, without its name: options of ``run``, or a command.
        note: what the user should know, or "".
    """

    save: Callable[[Path], None]
    data: dict[str, Any]
    title: str
    columns: list[tuple[str, bool]]
    rows: list[tuple[str, ...]]
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
        title=f"Tokens for {profile.rho:.0%} of the attention mass, {len(tokens)} prompts",
        columns=[("layer", True), ("mean over heads", True), ("largest head", True)],
        rows=[(str(i), f"{mean:.1f}", f"{most:.1f}") for i, (mean, most) in enumerate(demands)],
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
        title=f"Window attention of each layer, {len(tokens)} prompts",
        columns=[
            ("layer", True),
            ("entropy", True),
            ("variance", True),
            (f"share of the top {found.tops[middle]}", True),
        ],
        rows=[
            (str(layer), f"{entropy:.4g}", f"{variance:.3g}", f"{share:.1%}")
            for (layer, entropy, variance), share in zip(spreads, shares, strict=True)
        ],
        use=f"--arm {'rkv/cake/uniform' if found.no_queries else 'tri_attention/cake/uniform'} "
        "--profile",
        note=found.no_queries and f"For cake and dynamickv alone: {found.no_queries}",
    )


def _kl(model: Any, inputs: Texts, on_progress: OnProgress, **options: Any) -> Measured:
    from reasonalloc.calibration import ablation

    texts, kinds = inputs
    return _costs(ablation(model, texts, kinds=kinds, on_progress=on_progress, **options))


def _announce_kl(model: Any, inputs: Texts, **options: Any) -> str:
    from reasonalloc.calibration.ablation import estimate

    found = estimate(model, inputs[0], **options)
    minutes = found.seconds / 60
    text = f"{found.forward_tokens:,} tokens will run through parts of the model, for about "
    text += f"{minutes:.0f} minutes" if minutes >= 2 else f"{found.seconds:.0f} seconds"
    if model.dtype.itemsize < 4:
        text += (
            f". In {str(model.dtype).removeprefix('torch.')} rounding alone may cost as much as a "
            "head does: --dtype float32 measures better"
        )
    return text


def _costs(profile: CostProfile) -> Measured:
    """What a cost profile shows, whatever measured it."""
    from reasonalloc.cli.profile_tables import cost_table

    columns, rows = cost_table(profile, profile.budgets)
    return Measured(
        save=profile.save,
        data={"budgets": profile.budgets, "costs": profile.curves()},
        title="KL per token, one head at a budget, 1/1000 nat",
        columns=columns,
        rows=rows,
        use="reasonalloc profile show",
    )


OBJECTIVES = {
    "attention-mass": Objective(_attention_mass, (*_PROMPT_OPTIONS, "rho")),
    "statistics": Objective(_statistics, _PROMPT_OPTIONS, suffix=".safetensors"),
    "kl": Objective(_kl, (*_TEXT_OPTIONS, "stride"), ".json", _announce_kl),
}
