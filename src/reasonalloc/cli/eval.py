"""``reasonalloc eval``: arms on a benchmark, resumable, on one device or many."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import typer

from reasonalloc.cli import eval_options as e
from reasonalloc.cli import options as o
from reasonalloc.cli import output


@o.takes(model=o.MODEL, options=e.EVALUATE)
def command(*, model: o.ModelChoice, options: dict[str, Any], as_json: o.Json = False) -> None:
    """Accuracy of arms on a benchmark. Started again, it goes on where it was.

    Protocols: paper (temperature 0.6, top-p 0.95, 8 samples, 16384 tokens), greedy (1 sample, 16384
    tokens) and quick (greedy, 1 sample, 1024 tokens).
    """
    from reasonalloc.cli.watch import Watcher
    from reasonalloc.evaluation.evaluate import evaluate
    from reasonalloc.evaluation.evaluation_result import Interrupted
    from reasonalloc.evaluation.sharded import first_rank
    from reasonalloc.tables import show

    loading = asdict(model)
    watcher = Watcher()
    try:
        result = evaluate(loading.pop("name"), **options, **loading, progress=watcher)
    except Interrupted:  # the watcher said it
        raise typer.Exit(130) from None
    if (
        options["tp_plan"] is not None and not first_rank()
    ):  # it helped the first process of a torchrun
        return
    if as_json:
        facts: dict[str, Any] = {"task": result.task, "problems": len(result.problems)}
        facts["reference"] = result.reference and vars(result.reference)
        output.print_json({**facts, "results": result.summary})
    else:
        show(result.tables(), notes=result.legend())
    for note in result.never_compressed():
        watcher.note(note)
