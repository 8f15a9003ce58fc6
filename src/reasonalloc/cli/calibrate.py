"""``reasonalloc calibrate``: measure a model once, keep the file."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from reasonalloc.calibrated.objectives import CalibrationConfig, check_target, without_effect
from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.errors import UsageError

_PROMPTS, _TEXTS = "attention-mass, statistics", "kl, fisher"
_BOTH = "attention-mass, kl, fisher"


def _of_prompts(name: str) -> Any:
    return o.setting(name, CalibrationConfig, _PROMPTS)


def _of_texts(name: str, *names: str) -> Any:
    return o.setting(name, CalibrationConfig, _TEXTS, names=names)


Prompts = Annotated[
    Optional[str],  # noqa: UP045 (typer 0.16 on Python 3.10)
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="JSON lines with prompt, problem, question or messages; from no test set.",
        rich_help_panel=_PROMPTS,
    ),
]
Texts = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--texts",
        metavar="FILE",
        help="JSON lines as for 'fidelity --trajectories', with a kind if wanted; of no test set.",
        rich_help_panel=_TEXTS,
    ),
]
Out = Annotated[str, typer.Option("-o", "--out", metavar="FILE", help="File to write.")]
_C = CalibrationConfig
_OPTIONS = (
    ("objective", Annotated[str, o.setting("objective", _C, "Options")], _C.objective),
    ("count", Annotated[int, o.setting("count", _C, "Options")], _C.count),
    ("prompts", Prompts, None),
    ("rho", Annotated[float, _of_prompts("rho")], _C.rho),
    ("max_new_tokens", Annotated[int, _of_prompts("max_new_tokens")], _C.max_new_tokens),
    ("every", Annotated[int, _of_prompts("every")], _C.every),
    ("keys", Annotated[str, _of_prompts("keys")], _C.keys),
    ("texts", Texts, None),
    ("generate", Annotated[Optional[int], _of_texts("generate")], None),  # noqa: UP045
    ("policy", Annotated[Optional[str], _of_texts("policy")], None),  # noqa: UP045
    ("budgets", Annotated[Optional[str], _of_texts("budgets")], None),  # noqa: UP045
    ("interval", Annotated[int, _of_texts("interval")], _C.interval),
    ("window", Annotated[int, o.setting("window", _C, _BOTH)], _C.window),
    ("prompt_mode", Annotated[str, _of_texts("prompt", "--prompt-mode")], _C.prompt),
    ("check", Annotated[Optional[str], _of_texts("check")], None),  # noqa: UP045
    ("stride", Annotated[int, _of_texts("stride")], _C.stride),
    ("samples", Annotated[int, _of_texts("samples")], _C.samples),
    ("kv_dtypes", Annotated[str, _of_texts("kv_dtypes")], "auto"),
)


def _settings(context: typer.Context, values: dict[str, Any]) -> tuple[CalibrationConfig, str, str]:
    """Return the settings, the name of the option with the texts, and their file."""
    objective = values["objective"]
    unused = without_effect(objective)
    name = "texts" if CalibrationConfig(objective).chosen.reads_texts else "prompts"
    files = {key: values.pop(key) for key in ("prompts", "texts")}
    unused = ["prompt_mode" if option == "prompt" else option for option in unused]
    for option in sorted([*unused, *(files.keys() - {name})]):
        if o.given(context, option):
            flag = option.replace("_", "-")
            raise UsageError(f"--{flag} has no effect with --objective {objective}: leave it out")
    if values["budgets"] is not None:
        values["budgets"] = o.parse_budgets(values["budgets"])
    if (check := values["check"]) is not None:
        values["check"] = [] if check.strip() in ("", "0") else o.parse_budgets(check, "check")
    values["kv_dtypes"] = [kind.strip() for kind in values["kv_dtypes"].split(",")]
    path = files[name]
    if path is None:
        raise UsageError(f"no {name}: --objective {objective} needs --{name} FILE")
    return CalibrationConfig(**o.with_prompt(values)), f"--{name}", path


@o.takes(model=o.MODEL, settings=o.Options(_OPTIONS, _settings))
def command(
    out: Out,
    model: o.ModelChoice,
    settings: tuple[CalibrationConfig, str, str],
    as_json: o.Json = False,
) -> None:
    """Measure a model once with its full cache: the Reasoning Wave, statistics, or costs."""
    config, name, path = settings
    from reasonalloc.calibration.calibrate import check_texts
    from reasonalloc.calibration.jobs import prepare

    check_texts(path, config, name)
    target = check_target(out, config.objective, path, "--out")
    loaded, tokenizer = model.load()
    job = prepare(loaded, tokenizer, path, config, name, output.note)
    with output.stderr().status("Timing the model"):
        announced = job.announce()
    if announced:
        output.note(announced)
    with output.progress("Calibrating") as tell:
        measured = job.run(tell)
    measured.calibrated.save(target)
    if as_json:
        output.print_json({"profile": str(target), **measured.summary()})
        return
    for table in measured.tables():
        output.stdout().print(table.rich())
    if measured.note:
        output.note(measured.note)
    use = f"{measured.use} {target}"
    output.stdout().print(f"Written to {target}; use it with {use}")
