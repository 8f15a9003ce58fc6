"""``reasonalloc calibrate``: measure a model once, keep the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.errors import UsageError, unknown_name

_TEXT_FIELDS = ("prompt", "problem", "question")

Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="JSON lines with prompt, problem, question or messages; from no test set.",
    ),
]
Out = Annotated[str, typer.Option("-o", "--out", metavar="FILE", help="File to write.")]
Count = Annotated[int, typer.Option("--count", help="Prompts to use, from the top.", min=1)]
Rho = Annotated[float, typer.Option("--rho", help="Share of attention mass to keep.")]
NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", help="Generated tokens per prompt.", min=1)
]
Every = Annotated[int, typer.Option("--every", help="Generated tokens between samples.", min=1)]


ObjectiveName = Annotated[
    str,
    typer.Option(
        "--objective",
        help="attention-mass (a profile), or statistics (for tri_attention, cake, dynamickv).",
    ),
]


def command(
    context: typer.Context,
    prompts: Prompts,
    out: Out,
    model: o.ModelArgument = None,
    model_option: o.ModelOption = None,
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    objective: ObjectiveName = "attention-mass",
    count: Count = 8,
    rho: Rho = 0.93,
    max_new_tokens: NewTokens = 4096,
    every: Every = 128,
    as_json: o.Json = False,
) -> None:
    """Measure a model once with its full cache: the Reasoning Wave, or statistics."""
    from reasonalloc.cli.objectives import OBJECTIVES

    if objective not in OBJECTIVES:
        raise unknown_name("objective", objective, OBJECTIVES)
    chosen = OBJECTIVES[objective]
    own = {"rho": rho}  # options that only some objectives have
    for option in own.keys() - chosen.options:
        source = context.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"--{option} has no effect with --objective {objective}: leave it out")
    name = o.pick_model(model, model_option)
    messages = read_prompts(prompts, count)
    target = _writable(out)
    chosen.check_out(out)
    from rich.progress import Progress

    from reasonalloc.cli.prompts import encode
    from reasonalloc.loading import load_model

    with output.stderr().status("Loading the model"):
        loaded, tokenizer = load_model(name, dtype, "auto", trust_remote_code=trust_remote_code)
    tokens = [encode(tokenizer, m, False, True) for m in messages]
    with Progress(console=output.stderr(), transient=True) as bar:
        task = bar.add_task("Calibrating", total=len(tokens))
        measured = chosen.measure(
            loaded,
            tokens,
            lambda _: bar.advance(task),
            max_new_tokens=max_new_tokens,
            every=every,
            **{option: own[option] for option in chosen.options},
        )
    measured.save(target)
    if as_json:
        output.print_json({"profile": str(target), **measured.data})
        return
    output.stdout().print(output.grid(measured.columns, measured.rows, measured.title))
    if measured.note:
        output.note(measured.note)
    output.stdout().print(f"Written to {target}; use it with {measured.use} {target}")


def read_prompts(path: str, count: int) -> list[list[dict[str, str]]]:
    """The first ``count`` prompts of a JSON-lines file, as conversations.

    Raises:
        UsageError: the file cannot be read, or a line is no prompt; says which.
    """
    try:
        lines = Path(path).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UsageError(f"--prompts={path!r} cannot be read: {reason}") from None
    found: list[list[dict[str, str]]] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and len(found) < count:
            found.append(_prompt(path, number, line))
    if not found:
        raise UsageError(f"--prompts={path!r} holds no prompt: write one JSON object per line")
    return found


def _prompt(path: str, number: int, line: str) -> list[dict[str, str]]:
    try:
        data: Any = json.loads(line)
    except ValueError as error:
        raise UsageError(f"--prompts={path!r}, line {number} is not valid JSON: {error}") from None
    if isinstance(data, dict):
        if isinstance(data.get("messages"), list) and data["messages"]:
            return list(data["messages"])
        for field in _TEXT_FIELDS:
            if isinstance(data.get(field), str) and data[field].strip():
                return [{"role": "user", "content": data[field]}]
    raise UsageError(
        f"--prompts={path!r}, line {number} has none of prompt, problem, question and messages"
    )


def _writable(path: str) -> Path:
    target = Path(path).expanduser()
    if target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise UsageError(f"--out={path!r} cannot be written: give a file in an existing folder")
    return target
