"""Options of ``reasonalloc eval``."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from reasonalloc.cli import options as o

_RUN, _SAMPLING, _SCALE = "Run", "Sampling", "Scale"


def _option(*names: str, panel: str, **keywords: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **keywords)


TaskName = Annotated[
    str, _option("--task", panel=_RUN, help="math500, aime24, aime25, gsm8k, chain.")
]
Arms = Annotated[str, _option("--arms", panel=_RUN, help="Arms, separated by commas.")]
Budgets = Annotated[str, _option("--budgets", panel=_RUN, help="Budgets, separated by commas.")]
Out = Annotated[
    str, _option("--out", panel=_RUN, metavar="DIR", help="Results; a second run goes on.")
]
Data = Annotated[
    Optional[str],  # noqa: UP045
    _option("--data", panel=_RUN, metavar="FILE", help="Problems as JSON lines, not from the hub."),
]
Limit = Annotated[
    Optional[int],  # noqa: UP045
    _option("--limit", panel=_RUN, min=1, help="Only the first so many problems."),
]
ProtocolName = Annotated[
    str, _option("--protocol", panel=_SAMPLING, help="paper, greedy or quick, as said above.")
]
Samples = Annotated[
    Optional[int],  # noqa: UP045
    _option("--samples", panel=_SAMPLING, min=1, help="Per problem; replaces the protocol's."),
]
MaxNewTokens = Annotated[
    Optional[int],  # noqa: UP045
    _option("--max-new-tokens", panel=_SAMPLING, min=1, help="Replaces the protocol's."),
]
Temperature = Annotated[
    Optional[float],  # noqa: UP045
    _option("--temperature", panel=_SAMPLING, help="Replaces the protocol's; 0: greedy."),
]
TopP = Annotated[
    Optional[float],  # noqa: UP045
    _option("--top-p", panel=_SAMPLING, help="Replaces the protocol's."),
]
TopK = Annotated[
    Optional[int],  # noqa: UP045
    _option("--top-k", panel=_SAMPLING, help="Replaces the protocol's; 0: all tokens."),
]
Seed = Annotated[int, _option("--seed", panel=_SAMPLING, help="Of all samples.")]
Profiles = Annotated[
    Optional[list[str]],  # noqa: UP045
    _option(
        "--profile",
        panel="Budget",
        metavar="FILE",
        help="Calibrated file for the arms that read one; again for another kind of file.",
    ),
]
StepKind = Annotated[
    str, _option("--step", panel="Budget", help=f"{o.STEPS} No effect on the arm full.")
]
Attention = Annotated[
    str,
    _option(
        "--attention",
        panel="Budget",
        help="Attention backend, see 'reasonalloc ls'. No effect on the arm full.",
    ),
]
BatchSize = Annotated[
    int, _option("--batch-size", panel=_SCALE, min=1, help="Samples at a time; no result changes.")
]
Engine = Annotated[
    str, _option("--engine", panel=_SCALE, help="transformers, or vllm: one engine per arm.")
]
DeviceMap = Annotated[
    Optional[str],  # noqa: UP045
    _option("--device-map", panel=_SCALE, help="Passed to from_pretrained: auto, balanced, ..."),
]
TpPlan = Annotated[
    Optional[str],  # noqa: UP045
    _option(
        "--tp-plan",
        panel=_SCALE,
        help="Under torchrun: auto divides every layer's heads among GPUs.",
    ),
]
Workers = Annotated[
    int, _option("--workers", panel=_SCALE, min=1, help="With Ray, a GPU or CPU share each.")
]
RayAddress = Annotated[
    Optional[str],  # noqa: UP045
    _option("--ray-address", panel=_SCALE, help="Of a running cluster, such as auto."),
]
