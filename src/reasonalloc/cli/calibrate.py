"""``reasonalloc calibrate``: measure a model once, keep the file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.errors import UsageError, unknown_name

_TEXT_FIELDS = ("prompt", "problem", "question")

_PROMPTS, _TEXTS = "attention-mass, statistics", "kl, fisher"

Prompts = Annotated[
    Optional[str],  # noqa: UP045 (typer 0.16 on Python 3.10)
    typer.Option(
        "--prompts",
        metavar="FILE",
        help="JSON lines with prompt, problem, question or messages; from no test set.",
        rich_help_panel=_PROMPTS,
    ),
]
Out = Annotated[str, typer.Option("-o", "--out", metavar="FILE", help="File to write.")]
Count = Annotated[
    int, typer.Option("--count", help="Prompts or texts to use, from the top.", min=1)
]
Rho = Annotated[
    float,
    typer.Option(
        "--rho", help="Share of attention mass (attention-mass alone).", rich_help_panel=_PROMPTS
    ),
]
NewTokens = Annotated[
    int,
    typer.Option(
        "--max-new-tokens",
        help="Generated tokens per prompt.",
        min=1,
        rich_help_panel=_PROMPTS,
    ),
]
Every = Annotated[
    int,
    typer.Option(
        "--every", help="Generated tokens between samples.", min=1, rich_help_panel=_PROMPTS
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
Generate = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--generate",
        help="Complete prompts by so many tokens, full cache.",
        min=2,
        rich_help_panel=_TEXTS,
    ),
]
PolicyName = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--policy",
        help="Which tokens a head keeps (kl: rkv). fisher takes several, separated by commas, and "
        "keeps the best (value_aware,rkv).",
        rich_help_panel=_TEXTS,
    ),
]
Budgets = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--budgets",
        help="Tokens per head to measure at, separated by commas (kl: 24,48,96,192; fisher: "
        "16 to 384).",
        rich_help_panel=_TEXTS,
    ),
]
Check = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--check",
        help="Budgets at which all heads are compressed at once in the end, by the measured costs "
        "and equally; 0: none (64,128, less for short texts).",
        rich_help_panel=_TEXTS,
    ),
]
Interval = Annotated[
    int,
    typer.Option(
        "--interval", help="Generated tokens between two compressions.", rich_help_panel=_TEXTS
    ),
]
Window = Annotated[
    int,
    typer.Option(
        "--window", help="Most recent tokens that are always kept.", rich_help_panel=_TEXTS
    ),
]
Stride = Annotated[
    int,
    typer.Option(
        "--stride",
        help="Measure every so many tokens; saves time with large vocabularies (kl alone).",
        min=1,
        rich_help_panel=_TEXTS,
    ),
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples", help="Backward passes per text (fisher alone).", rich_help_panel=_TEXTS
    ),
]
ObjectiveName = Annotated[
    str,
    typer.Option(
        "--objective",
        help="attention-mass (a profile), statistics (for tri_attention, cake, dynamickv), or what "
        "holding one head to a budget costs: fisher (estimated from gradients), kl (exact, slow).",
    ),
]


def command(
    context: typer.Context,
    out: Out,
    model: o.ModelArgument = None,
    model_option: o.ModelOption = None,
    dtype: o.Dtype = "auto",
    device: o.Device = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    objective: ObjectiveName = "attention-mass",
    count: Count = 8,
    prompts: Prompts = None,
    rho: Rho = 0.93,
    max_new_tokens: NewTokens = 4096,
    every: Every = 128,
    texts: Texts = None,
    generate: Generate = None,
    policy: PolicyName = None,
    budgets: Budgets = None,
    interval: Interval = 128,
    window: Window = 8,
    check: Check = None,
    stride: Stride = 1,
    samples: Samples = 8,
    as_json: o.Json = False,
) -> None:
    """Measure a model once with its full cache: the Reasoning Wave, statistics, or costs."""
    from reasonalloc.cli.objectives import OBJECTIVES

    if objective not in OBJECTIVES:
        raise unknown_name("objective", objective, OBJECTIVES)
    chosen = OBJECTIVES[objective]
    of_some = {option for each in OBJECTIVES.values() for option in each.options}
    for option in sorted(of_some - set(chosen.options)):
        if o.given(context, option):
            flag = option.replace("_", "-")
            raise UsageError(f"--{flag} has no effect with --objective {objective}: leave it out")
    own = {name: context.params[name] for name in chosen.options}
    name = o.pick_model(model, model_option)
    if own.get("budgets", "") is None:
        del own["budgets"]  # the objective's own
    elif budgets is not None:
        own["budgets"] = o.parse_budgets(budgets)
    if check is not None:
        own["check"] = [] if check.strip() in ("", "0") else o.parse_budgets(check, "check")
    load = _texts(objective, own, count) if chosen.reads_texts else _prompts(objective, own, count)
    target = _writable(out)
    chosen.check_out(out)
    from reasonalloc.loading import load_model

    with output.stderr().status("Loading the model"):
        loaded, tokenizer = load_model(name, dtype, device, trust_remote_code=trust_remote_code)
    inputs = load(loaded, tokenizer)
    if chosen.announce is not None:
        with output.stderr().status("Timing the model"):
            announced = chosen.announce(loaded, inputs, **own)
        output.note(announced)
    with output.progress("Calibrating") as tell:
        measured = chosen.measure(loaded, inputs, tell, **own)
    measured.save(target)
    if as_json:
        output.print_json({"profile": str(target), **measured.data})
        return
    for title, columns, rows in measured.tables:
        output.stdout().print(output.grid(columns, rows, title))
    if measured.note:
        output.note(measured.note)
    output.stdout().print(f"Written to {target}; use it with {measured.use} {target}")


def _prompts(objective: str, own: dict[str, Any], count: int) -> Callable[[Any, Any], Any]:
    """Takes the prompts out of the options; what loads them needs the model's tokenizer."""
    path = own.pop("prompts")
    if path is None:
        raise UsageError(f"no prompts: --objective {objective} needs --prompts FILE")
    messages = read_prompts(path, count)
    from reasonalloc.cli.prompts import encode

    return lambda _, tokenizer: [encode(tokenizer, m, False, True) for m in messages]


def _texts(objective: str, own: dict[str, Any], count: int) -> Callable[[Any, Any], Any]:
    """The same for texts and their kinds."""
    path, generate = own.pop("texts"), own.pop("generate")
    if path is None:
        raise UsageError(f"no texts: --objective {objective} needs --texts FILE")
    from reasonalloc.cli.prompts import complete_texts
    from reasonalloc.texts import load_kinds, load_trajectories

    kinds = load_kinds(path, "--texts")[:count]

    def load(model: Any, tokenizer: Any) -> Any:
        found = load_trajectories(path, tokenizer, "--texts")[:count]
        return complete_texts(model, found, generate, f"--texts={path!r}"), kinds

    return load


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
