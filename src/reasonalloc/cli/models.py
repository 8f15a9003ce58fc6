"""``reasonalloc models``: which model families of the installed transformers work, and why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.errors import UsageError

if TYPE_CHECKING:
    from reasonalloc.diagnose.families import Family

Names = Annotated[
    Optional[list[str]],  # noqa: UP045 (typer 0.16 on Python 3.10)
    typer.Argument(
        metavar="[FAMILY]...",
        help="Model types, as in a model's config.json: qwen3_next. Default: all; a few minutes.",
        show_default=False,
    ),
]
Page = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--page", metavar="FILE", help="Also write it as a Markdown page."),
]


def command(names: Names = None, page: Page = None, as_json: o.Json = False) -> None:
    """Try every text model family of the installed transformers as a toy: works, or why not."""
    import transformers

    from reasonalloc.diagnose import families as f

    if page is not None and not Path(page).parent.is_dir():
        raise UsageError(f"--page {page}: there is no folder {Path(page).parent}: make it first")
    wanted = names or f.family_names()
    found = []
    with output.progress("Families") as tell:
        for family in f.try_families(wanted):
            found.append(family)
            tell(len(found), len(wanted))
    works, counted = f.share(found)
    if page is not None:
        Path(page).write_text(f.as_page(found, transformers.__version__), encoding="utf-8")
    if as_json:
        output.print_json(
            {
                "transformers": transformers.__version__,
                "works": works,
                "with_something_to_budget": counted,
                "families": [dataclasses.asdict(family) for family in found],
            }
        )
        return
    _show(found, f"Model families of transformers {transformers.__version__}")
    output.stdout().print(
        f"\n{works} of {counted} families with something to budget work.", markup=False
    )


def _show(families: Sequence[Family], title: str) -> None:
    columns = [(name, False) for name in ("family", "", "layers", "why not")]
    rows = [(f.name, f.verdict, ", ".join(f.kinds), f.reason) for f in families]
    output.stdout().print(output.grid(columns, rows, title))
