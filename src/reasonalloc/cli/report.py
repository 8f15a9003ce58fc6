"""``reasonalloc report``: what evaluations say, as a page and as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from reasonalloc.cli import options as o
from reasonalloc.cli import output

Folders = Annotated[
    list[str],
    typer.Argument(metavar="DIR...", help="Folders that 'reasonalloc eval' wrote."),
]
Out = Annotated[
    Optional[str],  # noqa: UP045 (typer 0.16 on Python 3.10)
    typer.Option(
        "--out",
        "-o",
        metavar="FILE",
        help="The page; report.html in the first folder if not given. Tables are put beside it.",
    ),
]
Base = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--base", help="Arm to compare with; if not given, the first that compresses."),
]
Paper = Annotated[
    bool, typer.Option("--paper", help="Lay the paper's own numbers beside (another protocol).")
]


def command(
    folders: Folders,
    out: Out = None,
    base: Base = None,
    paper: Paper = False,
    as_json: o.Json = False,
) -> None:
    """Accuracy, memory and speed of arms with intervals, paired differences, chains: a page."""
    try:
        _report(folders, out, base, paper, as_json)
    except KeyboardInterrupt:  # typer would leave without a word
        output.note("interrupted; the results are as they were")
        raise typer.Exit(130) from None


def _report(
    folders: list[str], out: str | None, base: str | None, paper: bool, as_json: bool
) -> None:
    from reasonalloc.evaluation.folder import EVENTS, LOCK, SAMPLES
    from reasonalloc.evaluation.samples import load_groups
    from reasonalloc.files import check_not_read, check_writable
    from reasonalloc.report.files import TABLES, write_all
    from reasonalloc.report.page import require_report

    require_report(("plotly", "jinja2", "scipy"))
    with output.stderr().status("Reading samples"):
        groups = load_groups(folders)
    page = check_writable(out if out is not None else Path(folders[0]).expanduser() / "report.html")
    tables = [check_writable(page.with_name(page.stem + end)) for end in TABLES]
    kept = [Path(folder) / name for folder in folders for name in (SAMPLES, EVENTS, LOCK)]
    for path in (page, *tables):
        check_not_read("--out", path, kept)
    from reasonalloc.report.results import results

    with output.stderr().status("Computing intervals"):
        data = results(groups, base, paper)
        write_all(data, page, tables)
    if as_json:
        shown = [{k: v for k, v in g.items() if k not in _HIDDEN} for g in data["groups"]]
        files = [str(path) for path in (page, *tables)]
        output.print_json({"version": data["version"], "files": files, "groups": shown})
        return
    for group in data["groups"]:
        _show(group)
        if paper and group["paper"] is None:
            output.note(f"--paper: the paper has no numbers for {group['task']}")
    console = output.stdout()
    console.print(f"Page: {page}", markup=False, soft_wrap=True)
    console.print(
        f"Tables: {', '.join(path.name for path in tables)} beside it", markup=False, soft_wrap=True
    )


#: What only the page needs.
_HIDDEN = ("heads", "drilldown", "profile", "id", "paper", "manifests")


def _show(group: dict[str, Any]) -> None:
    from reasonalloc.report.tables import group_table
    from reasonalloc.tables import show

    show([group_table(group)])
    console = output.stdout()
    ends = [row for row in group["paired_endings"] if row["beyond_noise"]]
    for line in (*group["notices"], *(row["verdict"] for row in (*group["paired"], *ends))):
        console.print(f"- {line}", markup=False, soft_wrap=True)
    console.print()
