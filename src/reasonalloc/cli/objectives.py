"""What ``reasonalloc calibrate`` can measure: one function per objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from reasonalloc.errors import UsageError

#: Called with the index of every finished prompt.
OnPrompt = Callable[[int], None]


@dataclass(frozen=True)
class Measured:
    """A measurement, ready to be written and shown.

    Attributes:
        save: writes the file.
        data: what ``--json`` shows besides the file's name.
        title, columns, rows: the table; a column is a title and whether it holds numbers.
        use: options of ``run`` that use the file, without its name.
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
        measure: takes the model, the prompts' token ids, ``on_prompt`` and the options by name.
        options: options of the command that only some objectives have, and this one has.
        suffix: what the file's name must end with, or "".
    """

    measure: Callable[..., Measured]
    options: tuple[str, ...] = ()
    suffix: str = ""

    def check_out(self, out: str) -> None:
        """Refuse a name that promises another kind of file."""
        if not out.endswith(self.suffix):
            raise UsageError(f"--out={out!r}: give a name that ends in {self.suffix}")


def _attention_mass(
    model: Any, tokens: list[Tensor], on_prompt: OnPrompt, **options: Any
) -> Measured:
    from reasonalloc.calibration import attention_mass

    profile = attention_mass(model, tokens, on_prompt=on_prompt, **options)
    demands = zip(profile.demand_mean, profile.demand_max, strict=True)
    return Measured(
        save=profile.save,
        data={"demand_mean": profile.demand_mean},
        title=f"Tokens for {profile.rho:.0%} of the attention mass, {len(tokens)} prompts",
        columns=[("layer", True), ("mean over heads", True), ("largest head", True)],
        rows=[(str(i), f"{mean:.1f}", f"{most:.1f}") for i, (mean, most) in enumerate(demands)],
        use="--arm reasonalloc --profile",
    )


def _statistics(model: Any, tokens: list[Tensor], on_prompt: OnPrompt, **options: Any) -> Measured:
    from reasonalloc.calibration import statistics

    found = statistics(model, tokens, on_prompt=on_prompt, **options)
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


OBJECTIVES = {
    "attention-mass": Objective(_attention_mass, ("rho",)),
    "statistics": Objective(_statistics, suffix=".safetensors"),
}
