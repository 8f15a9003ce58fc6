"""``reasonalloc fidelity``: arms against the full cache on known texts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Optional

import typer

from reasonalloc.cli import eval_options as e
from reasonalloc.cli import options as o
from reasonalloc.cli import output

Texts = Annotated[
    str,
    typer.Option(
        "--trajectories",
        metavar="FILE",
        help="JSON lines: prompt_ids, prompt or messages; completion_ids or completion, or an "
        "answer as the last message.",
    ),
]
Budgets = Annotated[str, typer.Option("--budgets", help=o.SEVERAL_BUDGETS)]
Arms = Annotated[
    str,
    typer.Option("--arms", help="Arms, separated by commas; ratios are to the first."),
]
Generate = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--generate", help="Complete prompts by so many tokens: full cache, in batches.", min=2
    ),
]
Out = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--out", metavar="FILE", help="Results as JSON lines; a second run goes on."),
]
_CADENCE = o.Options(
    (*e.CADENCE, ("attention", o.Attention, "auto")), lambda _, given: o.with_prompt(given)
)


@o.takes(model=o.MODEL, cadence=_CADENCE)
def command(
    *,
    texts: Texts,
    model: o.ModelChoice,
    budgets: Budgets = "128",
    arms: Arms = "rkv,streaming_llm,random",
    cadence: dict[str, Any],
    generate: Generate = None,
    out: Out = None,
    as_json: o.Json = False,
) -> None:
    """KL divergence, top-1 agreement and added NLL of arms, by exact replay of known texts."""
    from reasonalloc.cli.watch import Shown
    from reasonalloc.evaluation.fidelity import fidelity

    loading = asdict(model)
    name = loading.pop("name")
    cadence |= {"budgets": budgets, "arms": arms}
    result = fidelity(
        name, texts, generate=generate, out=out, **cadence, **loading, progress=Shown()
    )
    if as_json:
        facts: dict[str, Any] = {"model": name, "trajectories": len(result.texts)}
        facts["reference"] = result.reference and vars(result.reference)
        output.print_json({**facts, "results": result.summary})
    else:
        result.show()
