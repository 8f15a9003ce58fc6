"""Options that several commands share, and their conversion into settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from reasonalloc.config import CompressionConfig, parse_arm
from reasonalloc.errors import UsageError

if TYPE_CHECKING:
    from reasonalloc.planning.memory import LayerShape, MemoryPlan

DEFAULT_BUDGET = 1024
_BUDGET, _MODEL = "Budget", "Model"

ModelArgument = Annotated[
    Optional[str],  # noqa: UP045 (typer 0.16 on Python 3.10)
    typer.Argument(metavar="MODEL", help="Hub name, folder or .gguf file.", show_default=False),
]
ModelOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--model", help="The same, as an option.", rich_help_panel=_MODEL),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="float32, bfloat16, float16, or auto: the checkpoint's own (float32 for .gguf).",
        rich_help_panel=_MODEL,
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that comes with the model.",
        rich_help_panel=_MODEL,
    ),
]
Budget = Annotated[
    int,
    typer.Option(
        "--budget",
        help="Mean tokens kept per layer and KV head right after a compression.",
        rich_help_panel=_BUDGET,
    ),
]
BudgetList = Annotated[
    str,
    typer.Option(
        "--budget",
        help="Mean tokens kept per layer and KV head right after a compression; several, as "
        "64,128: each arm at each.",
        rich_help_panel=_BUDGET,
    ),
]
ArmName = Annotated[
    str,
    typer.Option(
        "--arm",
        help="policy/layers/heads or a preset, see 'reasonalloc ls'; full: no compression.",
        rich_help_panel=_BUDGET,
    ),
]
Interval = Annotated[
    int,
    typer.Option(
        "--interval",
        help="Generated tokens between two compressions.",
        rich_help_panel=_BUDGET,
    ),
]
Window = Annotated[
    int,
    typer.Option(
        "--window",
        help="Most recent tokens that are always kept.",
        rich_help_panel=_BUDGET,
    ),
]
Sinks = Annotated[
    int,
    typer.Option(
        "--n-sink",
        help="First tokens that are always kept.",
        rich_help_panel=_BUDGET,
    ),
]
ProtectPrompt = Annotated[
    bool,
    typer.Option(
        "--protect-prompt",
        help="Keep every token of the prompt.",
        rich_help_panel=_BUDGET,
    ),
]
ProfileFile = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--profile",
        metavar="FILE",
        help="Calibrated file for the policy or layer allocator that reads one.",
        rich_help_panel=_BUDGET,
    ),
]
Attention = Annotated[
    str,
    typer.Option(
        "--attention", help="Attention backend, see 'reasonalloc ls'.", rich_help_panel=_BUDGET
    ),
]
Device = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=_MODEL),
]
STEPS = "Decode steps: eager, static (fixed shapes), graph (CUDA), compile (CPU)."
StepKind = Annotated[
    str,
    typer.Option(
        "--step",
        help=STEPS,
        rich_help_panel=_BUDGET,
    ),
]
StepKinds = Annotated[
    str,
    typer.Option(
        "--step",
        help=f"{STEPS} Several are compared, as eager,compile.",
        rich_help_panel=_BUDGET,
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
]


def parse_budgets(text: str, name: str = "budgets") -> list[int]:
    """Budgets that are separated by commas; ``name`` is the option.

    Raises:
        UsageError: something else.
    """
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise UsageError(f"{name}={text!r} must be whole numbers, as 64,128") from None


def pick_model(argument: str | None, option: str | None) -> str:
    """The one model that was named.

    Raises:
        UsageError: none, or two.
    """
    if argument is not None and option is not None:
        raise UsageError(f"MODEL={argument!r} and --model={option!r}: give one of the two")
    name = argument if argument is not None else option
    if name is None:
        raise UsageError("no model: give a hub name, a folder or a .gguf file as MODEL or --model")
    return name


def given(context: typer.Context, name: str) -> bool:
    """Whether an option is on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def compression(context: typer.Context, arm: str, **settings: Any) -> CompressionConfig | None:
    """Settings of the cache; None means the full cache.

    Raises:
        UsageError: a wrong setting, an unknown name, or a setting that would have no effect.
    """
    parsed = parse_arm(arm)
    if parsed is None:
        for name in settings:
            if given(context, name) and name != "seed":
                raise UsageError(
                    f"--{name.replace('_', '-')} has no effect with --arm {arm}: leave it out, or "
                    "choose an arm that compresses"
                )
        return None
    from reasonalloc.allocators.head import HEAD_ALLOCATORS
    from reasonalloc.attention import choose_backend
    from reasonalloc.planning.budget import check_profile

    config = CompressionConfig(arm=parsed, **settings)
    check_profile(config)
    HEAD_ALLOCATORS.create(parsed.heads)
    choose_backend(config.attention)
    return config


@dataclass(frozen=True)
class Layout:
    """A model's attention layers and, under a budget, what each of them keeps.

    Attributes:
        shapes: all attention layers.
        totals: retained tokens per compressible layer, all its KV heads together; None for the
            full cache.
        config: the settings, None for the full cache.
    """

    shapes: tuple[LayerShape, ...]
    totals: tuple[int, ...] | None
    config: CompressionConfig | None

    def plan(self, batch: int, itemsize: int) -> MemoryPlan:
        """Exact bytes of a compressed cache; ``itemsize`` is bytes of one number."""
        from reasonalloc.planning.budget import plan_memory

        if self.config is None or self.totals is None:
            raise RuntimeError("the full cache has no plan")
        return plan_memory(self.config, self.shapes, self.totals, batch, itemsize)

    def full_bytes(self, batch: int, tokens: int, itemsize: int) -> int:
        """KV bytes of the model's own cache after ``tokens`` tokens per sequence."""
        return sum(s.full_bytes(batch, tokens, itemsize) for s in self.shapes)


def make_layout(model_config: Any, name: str, config: CompressionConfig | None) -> Layout:
    """Divide the budget among the layers of a model whose weights need not be loaded.

    Raises:
        UsageError: a broken or foreign profile, or a budget that does not fit.
        UnsupportedError: a model that cannot work.
    """
    from reasonalloc.planning.budget import bound_policy, layer_totals, planned_heads
    from reasonalloc.planning.shapes import layer_shapes, text_config

    text = text_config(model_config)
    shapes = layer_shapes(text, name)
    if config is None:
        return Layout(shapes, None, None)
    bound_policy(config, shapes, text, name)  # a wrong file is refused before weights are loaded
    planned_heads(config, shapes, text, name)
    return Layout(shapes, layer_totals(config, shapes, text, name), config)
