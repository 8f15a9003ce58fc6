"""Options that several commands share, and their conversion into settings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Optional, get_type_hints

import typer

from reasonalloc.cli import output
from reasonalloc.config import CompressionConfig, parse_arm
from reasonalloc.errors import UsageError
from reasonalloc.sizes import read_budget

DEFAULT_BUDGET = 1024
_BUDGET, _MODEL = "Budget", "Model"


def setting(
    name: str, of: type[Any], panel: str, more: str = "", names: Sequence[str] = (), **keywords: Any
) -> Any:
    """Return the option of a configuration's field.

    Args:
        name: of the field, whose help text it has.
        of: the configuration, a dataclass.
        panel: of the help page.
        more: is added to the help text.
        names: of the option; none: the field's.
        keywords: other arguments of ``typer.Option``.
    """
    metadata = of.__dataclass_fields__[name].metadata
    keywords = {"help": metadata["help"] + more, **metadata.get("option", {}), **keywords}
    names = names or (f"--{name.replace('_', '-')}",)
    return typer.Option(*names, rich_help_panel=panel, **keywords)


def _budget(name: str, more: str = "", **keywords: Any) -> Any:
    return setting(name, CompressionConfig, _BUDGET, more, **keywords)


def _model(*names: str, **keywords: Any) -> Any:
    return typer.Option(*names, rich_help_panel=_MODEL, **keywords)


ModelArgument = Annotated[
    Optional[str],  # noqa: UP045 (typer 0.16 on Python 3.10)
    typer.Argument(metavar="MODEL", help="Hub name, folder or .gguf file.", show_default=False),
]
ModelOption = Annotated[
    Optional[str],  # noqa: UP045
    _model("--model", help="The same, as an option."),
]
Dtype = Annotated[
    str,
    _model(
        "--dtype",
        help="float32, bfloat16, float16, or auto: the checkpoint's own (float32 for .gguf).",
    ),
]
Device = Annotated[str, _model("--device", help="auto, cpu, cuda, cuda:1, mps.")]
TrustRemoteCode = Annotated[
    bool, _model("--trust-remote-code", help="Run code that comes with the model.")
]
Budget = Annotated[str, _budget("budget", " Or bytes of a sequence: 64MiB, 25%@8192.")]
BudgetList = Annotated[
    str,
    _budget(
        "budget",
        help="Mean tokens kept per layer and KV head right after a compression, or bytes of a "
        "sequence; several, as 64,4MiB,25%@8192: each arm at each.",
    ),
]
SEVERAL_BUDGETS = "Budgets, in tokens or bytes, as 64,4MiB,25%@8192."
ArmName = Annotated[str, _budget("arm")]
Interval = Annotated[int, _budget("interval")]
Window = Annotated[int, _budget("window")]
Sinks = Annotated[int, _budget("n_sink")]
#: Commands with a ``--prompt`` of their own have the long name alone.
PromptMode = Annotated[str, _budget("prompt", names=("--prompt-mode", "--prompt"))]
PromptModeAlone = Annotated[str, _budget("prompt", names=("--prompt-mode",))]
PinTurns = Annotated[bool, _budget("pin_turns")]
PinLimit = Annotated[Optional[int], _budget("pin_limit")]  # noqa: UP045
PinOverflow = Annotated[str, _budget("pin_overflow")]
ProtectPrompt = Annotated[bool, _budget("protect_prompt")]
KvDtype = Annotated[str, _budget("kv_dtype", metavar="FORMAT")]
ProfileFile = Annotated[
    Optional[str],  # noqa: UP045
    _budget("profile", metavar="FILE"),
]
Attention = Annotated[str, _budget("attention")]
STEPS: str = CompressionConfig.__dataclass_fields__["step"].metadata["help"]
StepKind = Annotated[str, _budget("step")]
StepKinds = Annotated[str, _budget("step", " Several are compared, as eager,compile.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
]


@dataclass(frozen=True)
class Options:
    """Options of a command that become one argument of its function.

    Attributes:
        parameters: name, type and default of each.
        make: makes the argument from the context and their values by name.
    """

    parameters: tuple[tuple[str, Any, Any], ...]
    make: Callable[[typer.Context, dict[str, Any]], Any]


def takes(**groups: Options) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator: the named arguments of a command come from several options each."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function).parameters
        hints = get_type_hints(function, include_extras=True)
        flat: list[tuple[str, Any, Any]] = [("context", typer.Context, inspect.Parameter.empty)]
        for name, parameter in own.items():
            if name in groups:
                flat += groups[name].parameters
            elif name != "context":
                flat.append((name, hints[name], parameter.default))

        @functools.wraps(function)
        def command(**values: Any) -> None:
            context = values["context"] if "context" in own else values.pop("context")
            for name, group in groups.items():
                parts = {key: values.pop(key) for key, _, _ in group.parameters}
                values[name] = group.make(context, parts)
            function(**values)

        kind = inspect.Parameter.KEYWORD_ONLY
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(n, kind, default=d, annotation=a) for n, a, d in flat]
        )
        command.__annotations__ = {name: annotation for name, annotation, _ in flat}
        return command

    return decorate


@dataclass(frozen=True)
class ModelChoice:
    """The model that a command line names, and how it is loaded."""

    name: str
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False

    def load_config(self) -> Any:
        """Return the model's configuration, without its weights."""
        from reasonalloc.loading import load_config

        with output.stderr().status("Reading the model's configuration"):
            return load_config(self.name, self.trust_remote_code)

    def load(self, config: Any = None) -> tuple[Any, Any]:
        """Return the model and its tokenizer; ``config`` if it is loaded already."""
        from reasonalloc.loading import load_model

        with output.stderr().status("Loading the model"):
            return load_model(self.name, self.dtype, self.device, self.trust_remote_code, config)


_MODEL_OPTIONS = (
    ("model", ModelArgument, None),
    ("model_option", ModelOption, None),
    ("dtype", Dtype, "auto"),
    ("device", Device, "auto"),
    ("trust_remote_code", TrustRemoteCode, False),
)
_BUDGET_OPTIONS = {
    "budget": Budget,
    "arm": ArmName,
    "interval": Interval,
    "window": Window,
    "n_sink": Sinks,
    "prompt_mode": PromptMode,
    "pin_turns": PinTurns,
    "pin_limit": PinLimit,
    "pin_overflow": PinOverflow,
    "protect_prompt": ProtectPrompt,
    "kv_dtype": KvDtype,
    "profile": ProfileFile,
    "attention": Attention,
    "step": StepKind,
}


def _choose(_: typer.Context, values: dict[str, Any]) -> ModelChoice:
    name = pick_model(values.pop("model"), values.pop("model_option"))
    return ModelChoice(name, **values)


def _choose_any(_: typer.Context, values: dict[str, Any]) -> ModelChoice:
    argument, option = values.pop("model"), values.pop("model_option")
    none = argument is None and option is None
    return ModelChoice("" if none else pick_model(argument, option), **values)


#: The one model of a command; the same without a device, and one that may be missing.
MODEL = Options(_MODEL_OPTIONS, _choose)
MODEL_CONFIG = Options(tuple(p for p in _MODEL_OPTIONS if p[0] != "device"), _choose)
ANY_MODEL = Options(_MODEL_OPTIONS, _choose_any)


def compression_options(*left_out: str, **others: Any) -> Options:
    """Return the options of ``CompressionConfig`` as a group; the argument is None for ``full``.

    A command's own option ``--seed`` is the run's seed as well.

    Args:
        left_out: fields that the command has no option for.
        others: other annotations, by name.
    """
    own = {"budget": str(DEFAULT_BUDGET), "arm": "rkv", "prompt_mode": "evict"}
    parameters = tuple(
        (name, annotation, own.get(name, getattr(CompressionConfig, name, None)))
        for name, annotation in {**_BUDGET_OPTIONS, **others}.items()
        if name not in left_out
    )
    return Options(
        parameters, lambda context, v: compression(context, v.pop("arm"), **v, **_seed(context))
    )


def _seed(context: typer.Context) -> dict[str, int]:
    return {"seed": context.params["seed"]} if "seed" in context.params else {}


def parse_budgets(text: str, name: str = "budgets") -> list[int]:
    """Return whole numbers that were separated by commas; ``name`` is the option.

    Raises:
        UsageError: something else.
    """
    try:
        return [int(size) for size in text.split(",")]
    except ValueError:
        raise UsageError(f"{name}={text!r} must be whole numbers, as 64,128") from None


def pick_model(argument: str | None, option: str | None) -> str:
    """Return the one model that was named.

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


def with_prompt(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the field that ``--prompt-mode`` stands for under its own name."""
    return {{"prompt_mode": "prompt"}.get(name, name): v for name, v in settings.items()}


def compression(context: typer.Context, arm: str, **settings: Any) -> CompressionConfig | None:
    """Return the settings of the cache; None means the full cache.

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
    from reasonalloc.planning.files import check_profile

    if "budget" in settings:
        settings["budget"] = read_budget(settings["budget"])
    config = CompressionConfig(arm=parsed, **with_prompt(settings))
    check_profile(config)
    HEAD_ALLOCATORS.create(parsed.heads)
    choose_backend(config.attention)
    return config
