"""Options of ``reasonalloc eval``, of which other commands share some."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Optional

import typer

from reasonalloc.cli import options as o

_RUN, _SAMPLING, _BUDGET, _SCALE = "Run", "Sampling", "Budget", "Scale"
_REQUIRED = inspect.Parameter.empty


def _option(
    name: str, kind: Any, panel: str, text: str, default: Any = None, **keywords: Any
) -> tuple[str, Any, Any]:
    """An option as ``takes`` wants it; without a default it may be missing."""
    shown = typer.Option(
        f"--{name.replace('_', '-')}", rich_help_panel=panel, help=text, **keywords
    )
    return name, Annotated[kind | None if default is None else kind, shown], default


Profiles = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer 0.16 on Python 3.10)
    typer.Option(
        "--profile",
        rich_help_panel=_BUDGET,
        metavar="FILE",
        help="Calibrated file for the arms that read one; again for another kind of file.",
    ),
]
#: Cadence and files of arms, for ``evaluate`` and ``fidelity``.
CADENCE = (
    ("interval", o.Interval, 128),
    ("window", o.Window, 8),
    ("n_sink", o.Sinks, 0),
    ("prompt_mode", o.PromptMode, "evict"),
    ("pin_limit", o.PinLimit, None),
    ("pin_overflow", o.PinOverflow, "refuse"),
    ("protect_prompt", o.ProtectPrompt, False),
    ("kv_dtype", o.KvDtype, "auto"),
    ("profile", Profiles, None),
)
_NO_EFFECT = "No effect on the arm full."
_ATTENTION = f"Attention backend, see 'reasonalloc ls'. {_NO_EFFECT}"
_TASKS = "math500, aime24, aime25, gsm8k, chain."
_PARTS = (
    _option("task", str, _RUN, _TASKS, _REQUIRED),
    _option("out", str, _RUN, "Results; a second run goes on.", _REQUIRED, metavar="DIR"),
    _option("arms", str, _RUN, "Arms, separated by commas.", "full,rkv"),
    _option("budgets", str, _RUN, o.SEVERAL_BUDGETS, "1024"),
    _option("data", str, _RUN, "Problems as JSON lines, not from the hub.", metavar="FILE"),
    _option("limit", int, _RUN, "Only the first so many problems.", min=1),
    _option("protocol", str, _SAMPLING, "paper, greedy or quick, as said above.", "paper"),
    _option("samples", int, _SAMPLING, "Per problem; replaces the protocol's.", min=1),
    _option("max_new_tokens", int, _SAMPLING, "Replaces the protocol's.", min=1),
    _option("temperature", float, _SAMPLING, "Replaces the protocol's; 0: greedy."),
    _option("top_p", float, _SAMPLING, "Replaces the protocol's."),
    _option("top_k", int, _SAMPLING, "Replaces the protocol's; 0: all tokens."),
    _option("seed", int, _SAMPLING, "Of all samples.", 0),
    *CADENCE,
    _option("attention", str, _BUDGET, _ATTENTION, "auto"),
    _option("step", str, _BUDGET, f"{o.STEPS} {_NO_EFFECT}", "eager"),
    _option("batch_size", int, _SCALE, "Samples at a time; no result changes.", 8, min=1),
    _option("engine", str, _SCALE, "transformers, or vllm: one engine per arm.", "transformers"),
    _option("device_map", str, _SCALE, "Passed to from_pretrained: auto, balanced, ..."),
    _option("tp_plan", str, _SCALE, "Under torchrun: auto divides every layer's heads among GPUs."),
    _option("workers", int, _SCALE, "With Ray, a GPU or CPU share each.", 1, min=1),
    _option("ray_address", str, _SCALE, "Of a running cluster, such as auto."),
)
#: Everything but the model, as arguments of ``evaluate``.
EVALUATE = o.Options(_PARTS, lambda _, given: o.with_prompt(given))
