"""What can be measured of a model, with which options; light, so that ``--help`` is quick."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reasonalloc.calibrated.demand import KEYS
from reasonalloc.config import CompressionConfig, Prompt
from reasonalloc.errors import UsageError, unknown_name
from reasonalloc.files import as_path, check_not_read
from reasonalloc.whole import whole_number

_LISTS = {"budgets": "[64, 128]", "check": "[64]", "kv_dtypes": "['auto', 'int8']"}


@dataclass(frozen=True)
class Objective:
    """One thing to measure.

    Attributes:
        options: fields of ``CalibrationConfig`` that only some objectives have, and this one has.
        suffix: what the file's name must end with, or "".
        reads_texts: whether it measures known texts, not generations from prompts.
    """

    options: tuple[str, ...]
    suffix: str = ""
    reads_texts: bool = False


_PROMPTS = ("max_new_tokens", "every")
_TEXTS = ("generate", "policy", "budgets", "interval", "window", "prompt", "check")
OBJECTIVES = {
    "attention-mass": Objective((*_PROMPTS, "rho", "window", "keys")),
    "statistics": Objective(_PROMPTS, ".safetensors"),
    "kl": Objective((*_TEXTS, "stride"), ".json", reads_texts=True),
    "fisher": Objective((*_TEXTS, "samples", "kv_dtypes"), ".json", reads_texts=True),
}


@dataclass(frozen=True)
class CalibrationConfig:
    """Settings of a calibration. An objective looks at its own fields alone.

    Attributes:
        objective: a key of ``OBJECTIVES``: ``attention-mass`` (demand profile), ``statistics``, or
            ``fisher`` or ``kl`` (cost profile).
        count: prompts or texts to use, from the first.
        rho: share of attention mass to keep (attention-mass).
        max_new_tokens: generated tokens per prompt, at most (attention-mass, statistics).
        every: generated tokens between two samples (attention-mass, statistics).
        generate: tokens to complete prompts by (kl, fisher); None: texts are complete.
        policy: which tokens a head keeps (kl: one; fisher: one or several, separated by commas, of
            which the best is kept); None: the objective's own.
        budgets: tokens per head to measure at, rising (kl, fisher); None: the objective's own.
        interval: the cadence, in tokens (kl, fisher).
        window: most recent tokens that are always kept (kl, fisher), or whose queries are averaged
            (attention-mass).
        keys: ``all``, or ``generated``: attention to the prompt is not counted (attention-mass).
        prompt: ``evict``, or ``pin``: the prompt stays on top of the budget that is measured (kl,
            fisher).
        check: budgets at which all heads are compressed at once in the end (kl, fisher); none: no
            check; None: 64 and 128, less for short texts.
        stride: measure every so many tokens (kl).
        samples: backward passes per text (fisher).
        kv_dtypes: formats of older tokens to measure besides the model's own (fisher).
    """

    objective: str = field(
        default="attention-mass",
        metadata={
            "help": "attention-mass (a profile), statistics (for tri_attention, cake, dynamickv), "
            "or what holding one head to a budget costs: fisher (estimated from gradients), kl "
            "(exact, slow)."
        },
    )
    count: int = field(
        default=8, metadata={"help": "Prompts or texts to use, from the top.", "option": {"min": 1}}
    )
    rho: float = field(
        default=0.93, metadata={"help": "Share of attention mass (attention-mass alone)."}
    )
    max_new_tokens: int = field(
        default=4096, metadata={"help": "Generated tokens per prompt.", "option": {"min": 1}}
    )
    every: int = field(
        default=128, metadata={"help": "Generated tokens between samples.", "option": {"min": 1}}
    )
    generate: int | None = field(
        default=None,
        metadata={"help": "Complete prompts by so many tokens, full cache.", "option": {"min": 2}},
    )
    policy: str | None = field(
        default=None,
        metadata={
            "help": "Which tokens a head keeps (kl: rkv). fisher takes several, separated by "
            "commas, and keeps the best (predicted_loss,rkv)."
        },
    )
    budgets: Sequence[int] | None = field(
        default=None,
        metadata={
            "help": "Tokens per head to measure at, separated by commas (kl: 24,48,96,192; "
            "fisher: 16 to 384)."
        },
    )
    interval: int = field(
        default=CompressionConfig.interval,
        metadata={"help": "Generated tokens between two compressions."},
    )
    window: int = field(
        default=CompressionConfig.window,
        metadata={
            "help": "Most recent tokens that are always kept; attention-mass: those whose queries "
            "are averaged in a sample.",
            "option": {"min": 1},
        },
    )
    keys: str = field(
        default=KEYS[0],
        metadata={
            "help": "Whose attention mass counts: all, or generated, without the prompt's "
            "(attention-mass alone)."
        },
    )
    prompt: Prompt = field(
        default=CompressionConfig.prompt,
        metadata={
            "help": "The prompt: evict (competes), or pin (stays on top of the measured budget)."
        },
    )
    check: Sequence[int] | None = field(
        default=None,
        metadata={
            "help": "Budgets at which all heads are compressed at once in the end, by the "
            "measured costs and equally; 0: none (64,128, less for short texts)."
        },
    )
    stride: int = field(
        default=1,
        metadata={
            "help": "Measure every so many tokens; saves time with large vocabularies (kl alone).",
            "option": {"min": 1},
        },
    )
    samples: int = field(default=8, metadata={"help": "Backward passes per text (fisher alone)."})

    kv_dtypes: Sequence[str] = field(
        default=("auto",),
        metadata={
            "help": "Formats of older tokens to measure as well, separated by commas, for the arm "
            "best-bytes: auto,int8,int8:int4,int4h (fisher alone)."
        },
    )

    def __post_init__(self) -> None:
        if not isinstance(self.objective, str) or self.objective not in OBJECTIVES:
            raise unknown_name("objective", self.objective, OBJECTIVES)
        if self.keys not in KEYS:
            raise unknown_name("keys", self.keys, KEYS)
        object.__setattr__(self, "count", whole_number("count", self.count, 1))
        if self.generate is not None:
            object.__setattr__(self, "generate", whole_number("generate", self.generate, 2))
        if self.policy is not None and not isinstance(self.policy, str):
            raise UsageError(f"policy={self.policy!r} must be text, as 'predicted_loss,rkv'")
        for name, example in _LISTS.items():
            value = getattr(self, name)
            none = value is None and name != "kv_dtypes"
            if not none and (isinstance(value, str) or not isinstance(value, Iterable)):
                raise UsageError(f"{name}={value!r} must be a list, as {example}")

    @property
    def chosen(self) -> Objective:
        """The objective."""
        return OBJECTIVES[self.objective]


def without_effect(objective: str) -> list[str]:
    """Return the options that an objective does not look at.

    Raises:
        UsageError: an unknown objective.
    """
    own = CalibrationConfig(objective).chosen.options
    return sorted({name for each in OBJECTIVES.values() for name in each.options} - set(own))


def check_target(
    out: str | os.PathLike[str], objective: str, texts: Any, name: str = "out"
) -> Path:
    """Return the file to write.

    Args:
        out: its path.
        objective: what is measured.
        texts: what it is measured on; a file of them is not written over.
        name: what messages call it.

    Raises:
        UsageError: it cannot be written there, or its name promises another kind of file.
    """
    target, suffix = as_path(name, out), CalibrationConfig(objective).chosen.suffix
    given = f"{name}={os.fspath(out)!r}"
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise UsageError(f"{given} cannot be written: give a file in an existing folder")
    if not target.name.endswith(suffix):
        raise UsageError(f"{given}: give a name that ends in {suffix}")
    if isinstance(texts, str | os.PathLike):
        check_not_read(name, target, [texts])
    return target
