"""``reasonalloc calibrate``: measure a model once, keep the profile."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.errors import UsageError

_TEXT_FIELDS = ("prompt", "problem", "question")

Prompts = Annotated[
    str,
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="JSON lines with prompt, problem, question or messages; from no test set.",
    ),
]
Out = Annotated[str, typer.Option("-o", "--out", metavar="FILE", help="Profile to write.")]
Count = Annotated[int, typer.Option("--count", help="Prompts to use, from the top.", min=1)]
Rho = Annotated[float, typer.Option("--rho", help="Share of attention mass to keep.")]
NewTokens = Annotated[
    int, typer.Option("--max-new-tokens", help="Generated tokens per prompt.", min=1)
]
Every = Annotated[int, typer.Option("--every", help="Generated tokens between samples.", min=1)]


def command(
    prompts: Prompts,
    out: Out,
    model: o.ModelArgument = None,
    model_option: o.ModelOption = None,
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    count: Count = 8,
    rho: Rho = 0.93,
    max_new_tokens: NewTokens = 4096,
    every: Every = 128,
    as_json: o.Json = False,
) -> None:
    """Measure how many tokens each layer attends to (the Reasoning Wave) with the full cache."""
    name = o.pick_model(model, model_option)
    messages = read_prompts(prompts, count)
    target = _writable(out)
    from rich.progress import Progress

    from reasonalloc.calibration import attention_mass
    from reasonalloc.cli.prompts import encode
    from reasonalloc.loading import load_model

    with output.stderr().status("Loading the model"):
        loaded, tokenizer = load_model(name, dtype, "auto", trust_remote_code=trust_remote_code)
    tokens = [encode(tokenizer, m, False, True) for m in messages]
    with Progress(console=output.stderr(), transient=True) as bar:
        task = bar.add_task("Calibrating", total=len(tokens))
        profile = attention_mass(
            loaded,
            tokens,
            rho=rho,
            max_new_tokens=max_new_tokens,
            every=every,
            on_prompt=lambda _: bar.advance(task),
        )
    profile.save(target)
    if as_json:
        output.print_json({"profile": str(target), "demand_mean": profile.demand_mean})
        return
    rows = [
        (str(layer), f"{mean:.1f}", f"{most:.1f}")
        for layer, (mean, most) in enumerate(
            zip(profile.demand_mean, profile.demand_max, strict=True)
        )
    ]
    columns = [("layer", True), ("mean over heads", True), ("largest head", True)]
    title = f"Tokens for {rho:.0%} of the attention mass, {len(tokens)} prompts"
    output.stdout().print(output.grid(columns, rows, title))
    output.stdout().print(f"Written to {target}; use it with --arm reasonalloc --profile {target}")


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
