"""``reasonalloc bench``: speed and memory of arms, side by side."""

from __future__ import annotations

import contextlib
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional, cast

import typer

from reasonalloc.cli import eval_options as e
from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.errors import UsageError

if TYPE_CHECKING:
    from reasonalloc.benchmark.decode import Contender, Timing
    from reasonalloc.config import Arm, Step

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


def command(
    context: typer.Context,
    model: o.ModelArgument = None,
    model_option: o.ModelOption = None,
    shape: Shape = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    arms: Arms = "full,rkv",
    budget: o.BudgetList = "128",
    interval: o.Interval = 64,
    window: o.Window = 8,
    n_sink: o.Sinks = 0,
    protect_prompt: o.ProtectPrompt = False,
    profile: e.Profiles = None,
    attention: o.Attention = "auto",
    step: o.StepKinds = "eager",
    batches: Batches = "1,16",
    prompt: Prompt = 100,
    new_tokens: NewTokens = 512,
    at: At = None,
    repeats: Repeats = 1,
    out: Out = None,
    as_json: o.Json = False,
) -> None:
    """Time per step, tokens per second and bytes of arms beside the full cache, in one run."""
    settings: dict[str, Any] = {
        "interval": interval,
        "window": window,
        "n_sink": n_sink,
        "protect_prompt": protect_prompt,
        "attention": attention,
    }
    budgets = list(dict.fromkeys(o.parse_budgets(budget, "budget")))
    kinds = list(dict.fromkeys(part.strip() for part in step.split(",")))
    contenders = _contenders(arms, profile or [], budgets, kinds, **settings)
    if all(contender.config is None for contender in contenders):
        for option in ("budget", "window", "n_sink", "protect_prompt", "attention", "step"):
            if o.given(context, option):
                raise UsageError(
                    f"--{option.replace('_', '-')} has no effect with --arms {arms}: leave it out, "
                    "or add an arm that compresses"
                )
    sizes = o.parse_budgets(batches, "batch")
    points = sorted({*(o.parse_budgets(at, "at") if at else []), new_tokens})
    if min(sizes) < 1:
        raise UsageError(f"batch={batches!r} must be numbers of at least 1")
    if not 1 <= points[0] <= points[-1] <= new_tokens:
        raise UsageError(f"at={at!r} is not within new_tokens={new_tokens}")
    if out is not None and not Path(out).expanduser().parent.is_dir():
        raise UsageError(f"out={out!r}: there is no such folder")
    from reasonalloc.benchmark.machine import machine
    from reasonalloc.benchmark.summary import summarise

    name, loaded = _load(model, model_option, shape, dtype, device, trust_remote_code)
    _check(loaded, contenders, prompt + max(new_tokens, interval + 1) + interval)
    data: dict[str, Any] = {
        "command": "reasonalloc " + " ".join(sys.argv[1:]),
        "model": name,
        "machine": machine(loaded),
        "budgets": budgets,
        **settings,
        "step": step,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "batches": [],
    }
    try:
        for size in sizes:
            data["batches"].append({"batch": size, "runs": [], "weight_products": []})
            _measure(loaded, contenders, size, prompt, new_tokens, interval, repeats, data)
    except KeyboardInterrupt:
        output.note("interrupted: what is finished follows")
        data["interrupted"] = True
    data["summary"] = summarise(data, points)
    if out is not None:
        import json

        from reasonalloc.files import replacing

        with replacing(Path(out).expanduser()) as partial:
            partial.write_text(json.dumps(data))
    if as_json:
        output.print_json({k: v for k, v in data.items() if k != "batches"})
    else:
        _show(data, points)
    if data.get("interrupted"):
        raise typer.Exit(130)


def _contenders(
    arms: str, paths: list[str], budgets: list[int], steps: list[str], **settings: Any
) -> list[Contender]:
    from reasonalloc.benchmark.decode import STATIC, Contender
    from reasonalloc.config import parse_arm
    from reasonalloc.evaluation.arm_files import as_settings, choose_files
    from reasonalloc.evaluation.arms import check_names, split_arms
    from reasonalloc.evaluation.batch import Job, Settings

    names = list(dict.fromkeys(split_arms(arms)))
    compressing = [n for n in names if n != STATIC and parse_arm(n) is not None]
    for name in compressing:
        check_names(cast("Arm", parse_arm(name)))
    shared = {**as_settings(choose_files(compressing, paths)), **settings}
    found = []
    for name in names:
        if name not in compressing:
            found.append(Contender(name))
            continue
        for budget, step in itertools.product(budgets, steps):
            config = Settings(**shared, step=cast("Step", step)).config(Job(name, budget))
            sized = name if len(budgets) == 1 else f"{name} at {budget}"
            found.append(Contender(sized if len(steps) == 1 else f"{sized}, {step}", config))
    if not found:
        raise UsageError("arms is empty: name at least one, as full,rkv")
    return found


def _load(
    argument: str | None,
    option: str | None,
    shape: str | None,
    dtype: str,
    device: str,
    trust: bool,
) -> tuple[str, Any]:
    from reasonalloc.benchmark.shapes import build_shape
    from reasonalloc.loading import DTYPES, load_model, resolve_device

    if shape is None:
        name = o.pick_model(argument, option)
        with output.stderr().status("Loading the model"):
            return name, load_model(name, dtype, device, trust_remote_code=trust)[0]
    if argument is not None or option is not None:
        raise UsageError(f"MODEL={argument or option!r} and --shape={shape!r}: give one of the two")
    place = resolve_device(device)
    kind = dtype if dtype != "auto" else "float32" if place.type == "cpu" else "bfloat16"
    if kind not in DTYPES:
        raise UsageError(f"dtype={dtype!r} is unknown: choose one of {', '.join(DTYPES)}, auto")
    with output.stderr().status("Making random weights"):
        return f"{shape} (random weights)", build_shape(shape, DTYPES[kind], place)


def _check(model: Any, contenders: list[Contender], tokens: int) -> None:
    """Refuse what cannot run before anything is measured."""
    from reasonalloc.integrations.hf import attach_config

    for contender in contenders:
        if contender.config is not None:
            with attach_config(model, contender.config):
                pass
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise UsageError(
            f"prompt, new_tokens and one more interval are {tokens} tokens, the model has {limit} "
            "positions: give fewer --new-tokens"
        )


def _measure(
    model: Any,
    contenders: list[Contender],
    batch: int,
    prompt: int,
    new_tokens: int,
    interval: int,
    repeats: int,
    data: dict[str, Any],
) -> None:
    import torch
    from rich.progress import Progress

    from reasonalloc.benchmark.decode import decode, weight_products

    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, prompt), generator=generator, device="cpu").to(
        model.device
    )
    found = data["batches"][-1]
    with Progress(console=output.stderr(), transient=True) as progress:
        for contender in contenders:  # warm-up, past a compression: nobody touches memory first
            with contextlib.suppress(torch.OutOfMemoryError):
                decode(model, contender, ids, interval + 1, 1)
        for repeat in range(repeats):
            found["weight_products"].extend(weight_products(model, batch))
            first = repeat % len(contenders)  # nobody always comes first
            for contender in contenders[first:] + contenders[:first]:
                task = progress.add_task(
                    f"batch {batch}, {contender.name}, run {repeat + 1} of {repeats}",
                    total=new_tokens,
                )

                def watch(steps: int, task: Any = task) -> None:
                    if steps % 16 == 0:
                        progress.update(task, completed=steps)

                try:
                    timing = decode(model, contender, ids, new_tokens, interval, watch)
                except torch.OutOfMemoryError:
                    found["runs"].append({"arm": contender.name, "out_of_memory": True})
                else:
                    found["runs"].append(_row(contender, timing))
                progress.remove_task(task)
        found["weight_products"].extend(weight_products(model, batch))


def _row(contender: Contender, timing: Timing) -> dict[str, Any]:
    split = timing.split
    # Of a replayed step, attention is not a part that could be timed.
    whole = contender.config is not None and contender.config.step in ("graph", "compile")
    return {
        "arm": contender.name,
        "prefill_seconds": timing.prefill_seconds,
        "steps": [round(s, 7) for s in timing.steps],
        "attention": None if whole else split.attention / split.total,
        "compression": split.compression / split.total,
        "rest": split.rest / split.total,
        "kv_bytes": timing.kv_bytes,
        "peak_bytes": timing.peak_bytes,
    }


def _show(data: dict[str, Any], points: list[int]) -> None:
    from reasonalloc.benchmark.summary import PARTS

    for entry in data["summary"]:
        rows = []
        for arm in entry["arms"]:
            if arm.get("out_of_memory"):
                rows.append([arm["arm"], "out of memory", *[""] * (len(points) + 5)])
                continue
            rows.append(
                [
                    arm["arm"],
                    f"{arm['tokens_per_second']:.1f}",
                    *(f"{1e3 * arm['step_seconds'][str(p)]:.1f}" for p in points),
                    f"{1e3 * arm['quartiles'][0]:.1f}-{1e3 * arm['quartiles'][2]:.1f}",
                    *("-" if arm[part] is None else f"{100 * arm[part]:.1f} %" for part in PARTS),
                    output.human(arm["kv_bytes"]),
                ]
            )
        title = (
            f"{data['model']}, batch {entry['batch']}: weight products alone "
            f"{1e3 * entry['weight_products']:.1f} ms"
        )
        heads = [("arm", False), ("tok/s", True), *((f"ms@{p}", True) for p in points)]
        parts = ("quartiles", "attn", "compr", "rest", "KV")
        output.stdout().print(output.grid([*heads, *((p, True) for p in parts)], rows, title))
    output.stdout().print(
        "tok/s: over the whole decode; ms@N: mean of the interval that ends at N new tokens, its "
        "compression included; quartiles: of all steps (ms); attn, compr, rest: attention, "
        "compression and the rest of one more interval at the end, timed one by one (a replayed "
        "step's attention is in the rest).",
        style="dim",
    )
