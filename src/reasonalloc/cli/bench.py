"""``reasonalloc bench``: speed and memory of arms, side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from reasonalloc.cli import eval_options as e
from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.errors import UsageError

if TYPE_CHECKING:
    from reasonalloc.benchmark.decode import Contender
    from reasonalloc.benchmark.run import Bench

Shape = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--shape", help="Random weights instead: smollm2-135m, llama-8b, qwen-14b."),
]
Arms = Annotated[str, typer.Option("--arms", help="Arms; full, full-static: no compression.")]
Batches = Annotated[str, typer.Option("--batch", help="Batch sizes, separated by commas.")]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=2, help="Decode steps of a run.")]
At = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--at", help="Time per step at so many new tokens, as 300,4000; the last anyway."),
]
Prompt = Annotated[int, typer.Option("--prompt", min=1, help="Tokens of the (random) prompts.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Runs per arm, taking turns.")]
Out = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--out", metavar="FILE", help="The result as JSON, every step's time included."),
]


_PROMPT = ("prompt", "pin_limit", "pin_overflow", "protect_prompt")
_SETTINGS = ("interval", "window", "n_sink", *_PROMPT, "kv_dtype", "attention")
_BUDGET = o.Options(
    (
        ("budget", o.BudgetList, "128"),
        ("interval", o.Interval, 64),
        ("window", o.Window, 8),
        ("n_sink", o.Sinks, 0),
        ("prompt_mode", o.PromptModeAlone, "evict"),
        ("pin_limit", o.PinLimit, None),
        ("pin_overflow", o.PinOverflow, "refuse"),
        ("protect_prompt", o.ProtectPrompt, False),
        ("kv_dtype", o.KvDtype, "auto"),
        ("profile", e.Profiles, None),
        ("attention", o.Attention, "auto"),
        ("step", o.StepKinds, "eager"),
    ),
    lambda _, values: o.with_prompt(values),
)


@o.takes(model=o.ANY_MODEL, options=_BUDGET)
def command(
    context: typer.Context,
    *,
    model: o.ModelChoice,
    shape: Shape = None,
    arms: Arms = "full,rkv",
    options: dict[str, Any],
    batches: Batches = "1,16",
    prompt: Prompt = 100,
    new_tokens: NewTokens = 512,
    at: At = None,
    repeats: Repeats = 1,
    out: Out = None,
    as_json: o.Json = False,
) -> None:
    """Time per step, tokens per second and bytes of arms beside the full cache, in one run."""
    settings = {name: options[name] for name in _SETTINGS}
    from reasonalloc.benchmark.contenders import make_contenders
    from reasonalloc.evaluation.arms import list_budgets

    budgets = list_budgets(options["budget"])
    contenders = make_contenders(
        arms, options["profile"] or [], budgets, _several(options["step"]), **settings
    )
    _check_effect(context, arms, contenders)
    sizes = o.parse_budgets(batches, "batch")
    points = sorted({*(o.parse_budgets(at, "at") if at else []), new_tokens})
    if min(sizes) < 1:
        raise UsageError(f"batch={batches!r} must be numbers of at least 1")
    if not 1 <= points[0] <= points[-1] <= new_tokens:
        raise UsageError(f"at={at!r} is not within new_tokens={new_tokens}")
    if out is not None:
        from reasonalloc.files import check_not_read, check_writable

        check_not_read("--out", check_writable(out), [*(options["profile"] or [])])
    from reasonalloc.benchmark.machine import machine
    from reasonalloc.benchmark.run import Bench

    name, loaded = _load(model, shape)
    bench = Bench(loaded, contenders, prompt, new_tokens, settings["interval"], repeats)
    bench.check()
    data: dict[str, Any] = {
        "command": "reasonalloc " + " ".join(sys.argv[1:]),
        "model": name,
        "machine": machine(loaded),
        "budgets": budgets,
        **settings,
        "step": options["step"],
        "prompt": prompt,
        "new_tokens": new_tokens,
        "batches": [],
    }
    _measure(bench, sizes, data)
    _finish(data, points, out, as_json)
    if data.get("interrupted"):
        raise typer.Exit(130)


def _several(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def _check_effect(context: typer.Context, arms: str, contenders: list[Contender]) -> None:
    if any(contender.config is not None for contender in contenders):
        return
    own = ("prompt_mode", "pin_limit", "pin_overflow", "protect_prompt")
    for option in ("budget", "window", "n_sink", *own, "kv_dtype", "attention", "step"):
        if o.given(context, option):
            raise UsageError(
                f"--{option.replace('_', '-')} has no effect with --arms {arms}: leave it out, "
                "or add an arm that compresses"
            )


def _load(model: o.ModelChoice, shape: str | None) -> tuple[str, Any]:
    from reasonalloc.benchmark.shapes import build_shape
    from reasonalloc.loading import DTYPES, resolve_device

    if shape is None:
        name = o.pick_model(model.name or None, None)
        return name, model.load()[0]
    if model.name:
        raise UsageError(f"MODEL={model.name!r} and --shape={shape!r}: give one of the two")
    place, dtype = resolve_device(model.device), model.dtype
    kind = dtype if dtype != "auto" else "float32" if place.type == "cpu" else "bfloat16"
    if kind not in DTYPES:
        raise UsageError(f"dtype={dtype!r} is unknown: choose one of {', '.join(DTYPES)}, auto")
    with output.stderr().status("Making random weights"):
        return f"{shape} (random weights)", build_shape(shape, DTYPES[kind], place)


def _measure(bench: Bench, sizes: list[int], data: dict[str, Any]) -> None:
    """Fill ``data``; Ctrl-C ends it early and keeps what is finished."""
    from rich.progress import Progress

    with Progress(console=output.stderr(), transient=True) as progress:
        task, shown = progress.add_task("", visible=False), ""

        def watch(text: str, steps: int) -> None:
            nonlocal task, shown
            if text != shown:
                progress.remove_task(task)
                task, shown = progress.add_task(text, total=bench.new_tokens), text
            elif steps % 16 == 0:
                progress.update(task, completed=steps)

        try:
            for size in sizes:
                data["batches"].append({"batch": size, "runs": [], "weight_products": []})
                bench.measure(size, data["batches"][-1], watch)
        except KeyboardInterrupt:
            data["interrupted"] = True
    if "interrupted" in data:
        output.note("interrupted: what is finished follows")


def _finish(data: dict[str, Any], points: list[int], out: str | None, as_json: bool) -> None:
    from reasonalloc.benchmark.summary import LEGEND, bench_table, summarise

    data["summary"] = summarise(data, points)
    if out is not None:
        import json

        from reasonalloc.files import replacing

        with replacing(Path(out).expanduser()) as partial:
            partial.write_text(json.dumps(data))
    if as_json:
        output.print_json({k: v for k, v in data.items() if k != "batches"})
        return
    for entry in data["summary"]:
        output.stdout().print(bench_table(data["model"], entry, points).rich())
    output.stdout().print(LEGEND, style="dim")
