"""``reasonalloc run``: generate under a budget, streaming."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.errors import UsageError

if TYPE_CHECKING:
    from reasonalloc.cli.generation import Progress, Sampling

_PROMPT, _SAMPLING = "Prompt (one of)", "Generation"

Prompt = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--prompt", metavar="TEXT", help="The prompt.", rich_help_panel=_PROMPT),
]
PromptFile = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--prompt-file",
        metavar="FILE",
        help="A text file with the prompt; - is stdin.",
        rich_help_panel=_PROMPT,
    ),
]
Chat = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--chat",
        metavar="FILE",
        help='A JSON list of {"role": ..., "content": ...}; - is stdin.',
        rich_help_panel=_PROMPT,
    ),
]
NoTemplate = Annotated[
    bool,
    typer.Option(
        "--no-chat-template",
        help="Give the prompt to the model as it is.",
        rich_help_panel=_PROMPT,
    ),
]
MaxNew = Annotated[
    int,
    typer.Option(
        "--max-new-tokens", help="Most tokens to generate.", min=1, rich_help_panel=_SAMPLING
    ),
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", help="0 is greedy.", min=0.0, rich_help_panel=_SAMPLING),
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p",
        help="Share of probability to sample from; needs a temperature.",
        min=0.0,
        max=1.0,
        rich_help_panel=_SAMPLING,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        help="Of the sampling and of the policy 'random'.",
        min=0,
        max=2**32 - 1,  # what generators take
        rich_help_panel=_SAMPLING,
    ),
]


def command(
    context: typer.Context,
    model: o.ModelArgument = None,
    model_option: o.ModelOption = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    prompt: Prompt = None,
    prompt_file: PromptFile = None,
    chat: Chat = None,
    no_chat_template: NoTemplate = False,
    budget: o.Budget = o.DEFAULT_BUDGET,
    arm: o.ArmName = "rkv",
    interval: o.Interval = 128,
    window: o.Window = 8,
    n_sink: o.Sinks = 0,
    protect_prompt: o.ProtectPrompt = False,
    profile: o.ProfileFile = None,
    attention: o.Attention = "auto",
    step: o.StepKind = "eager",
    max_new_tokens: MaxNew = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    as_json: o.Json = False,
) -> None:
    """Generate under a KV budget; the text goes to stdout, progress and summary to stderr."""
    from reasonalloc.cli.prompts import encode, fit_length, read_messages

    name = o.pick_model(model, model_option)
    config = o.compression(
        context,
        arm,
        budget=budget,
        interval=interval,
        window=window,
        n_sink=n_sink,
        protect_prompt=protect_prompt,
        profile=profile,
        attention=attention,
        step=step,
        seed=seed,
    )
    if top_p == 0 or (top_p < 1 and temperature == 0):
        raise UsageError(
            f"--top-p={top_p} needs a value above 0 and a --temperature above 0 to have an effect"
        )
    messages = read_messages(prompt, prompt_file, chat)

    from reasonalloc.cli.generation import Sampling
    from reasonalloc.loading import load_config, load_model

    with output.stderr().status(f"Loading {name}"):
        model_config = load_config(name, trust_remote_code)
        layout = o.make_layout(model_config, name, config)
        loaded, tokenizer = load_model(name, dtype, device, trust_remote_code, model_config)
    tokens = encode(tokenizer, messages, chat is not None, not no_chat_template)
    max_new_tokens = fit_length(loaded.config, int(tokens.shape[1]), max_new_tokens)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    result = _generate(loaded, tokenizer, tokens, sampling, layout, not as_json)
    report = _report(result, name, str(config.arm) if config else "full")
    if as_json:
        output.print_json(report)
    else:
        _summary(result, report)
    if result.stopped == "interrupted":
        raise typer.Exit(130)


def _generate(
    model: Any,
    tokenizer: Any,
    tokens: Any,
    sampling: Sampling,
    layout: o.Layout,
    show_text: bool,
) -> Progress:
    from reasonalloc.cli.generation import generate
    from reasonalloc.cli.live import Screen
    from reasonalloc.integrations.hf import attach_config

    with contextlib.ExitStack() as stack:
        attachment = None
        if layout.config is not None:
            attachment = stack.enter_context(attach_config(model, layout.config))
        screen = stack.enter_context(Screen(show_text))
        result = generate(
            model,
            tokenizer,
            tokens,
            sampling,
            layout,
            attachment,
            lambda progress, text: screen.update(progress.line(), text),
        )
    if show_text and not sys.stdout.isatty() and not result.text.endswith("\n"):
        print(flush=True)
    return result


def _report(result: Progress, model: str, arm: str) -> dict[str, Any]:
    config = result.layout.config
    return {
        "model": model,
        "arm": arm,
        "budget": config.budget if config else None,
        "interval": config.interval if config else None,
        "window": config.window if config else None,
        "text": result.text,
        "tokens": result.tokens,
        "stopped": result.stopped,
        "prompt_tokens": result.prompt_tokens,
        "generated_tokens": len(result.tokens),
        "prefill_seconds": round(result.prefill_seconds, 4),
        "decode_seconds": round(result.decode_seconds, 4),
        "tokens_per_second": round(result.speed, 2),
        "cached_tokens": result.cached_tokens,
        "kv_bytes": {
            "now": result.kv_bytes,
            "planned": result.planned_bytes,
            "full": result.full_bytes,
            "saved": result.full_bytes - result.kv_bytes,
        },
        "bookkeeping_bytes": result.bookkeeping_bytes,
        "layers": sum(s.compressible for s in result.layout.shapes),
        "layer_compressions": result.layer_compressions,
        "compressed": result.layer_compressions > 0,
    }


def _summary(result: Progress, report: dict[str, Any]) -> None:
    sizes, config = report["kv_bytes"], result.layout.config
    stopped = {"end": "", "length": ", stopped at --max-new-tokens", "interrupted": ", interrupted"}
    rows = [
        ("prompt", f"{result.prompt_tokens} tokens, read in {result.prefill_seconds:.2f} s"),
        ("generated", f"{len(result.tokens)} tokens{stopped[result.stopped]}"),
        ("speed", f"{result.speed:.1f} tok/s"),
        ("KV cache now", output.human(sizes["now"])),
        ("planned", f"{output.human(sizes['planned'])}{_match(result, sizes)}"),
    ]
    if config is not None:
        rows.append(("full cache would take", f"{output.human(sizes['full'])}{_saved(sizes)}"))
        rows.append(("compressions", _compressions(result)))
    console = output.stderr()
    console.print()
    console.print(output.pairs(rows, title=f"{report['arm']}{_cadence(report)}"))


def _cadence(report: dict[str, Any]) -> str:
    if report["budget"] is None:
        return ""
    return f", budget {report['budget']}, every {report['interval']} tokens"


def _match(result: Progress, sizes: dict[str, int]) -> str:
    if result.stopped == "interrupted":  # perhaps in the middle of a step, between two layers
        return ""
    return " (exactly)" if sizes["planned"] == sizes["now"] else " (differs: please report this)"


def _saved(sizes: dict[str, int]) -> str:
    if sizes["saved"] > 0:
        return f" ({output.human(sizes['saved'])} saved)"
    return (
        " (less: the compressed cache has its full size from the start and pays off once the text "
        "is longer than budget and interval together)"
    )


def _compressions(result: Progress) -> str:
    count, config = result.layer_compressions, result.layout.config
    layers = sum(s.compressible for s in result.layout.shapes)
    if count:
        return f"{count} over {layers} layers"
    budget = config.budget if config else 0
    return (
        f"none: {result.cached_tokens} tokens never exceeded the budget of {budget} at a boundary, "
        "so the text is that of the full cache"
    )
