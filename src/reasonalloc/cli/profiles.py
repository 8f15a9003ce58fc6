"""``reasonalloc profiles``: the calibrated files that come with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from reasonalloc.cli import options as o
from reasonalloc.cli import output
from reasonalloc.errors import UsageError

Share = Annotated[
    Optional[str],  # noqa: UP045 (typer 0.16 on Python 3.10)
    typer.Option(
        "--share",
        metavar="FILE",
        help="Write a profile of 'reasonalloc calibrate' as it would be shipped: means over its "
        "texts, under the name that finds it.",
    ),
]
Name = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--name", help="With --share: the model's public name, as Qwen/Qwen3-0.6B."),
]
Folder = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--out", "-o", metavar="FOLDER", help="With --share: where. Default: here."),
]


def command(
    share: Share = None, name: Name = None, out: Folder = None, as_json: o.Json = False
) -> None:
    """Models whose profiles come with the package: 'best' needs no calibration for them."""
    if share is not None:
        _share(share, name, "." if out is None else out, as_json)
        return
    for option, value in (("--name", name), ("--out", out)):
        if value is not None:
            raise UsageError(f"{option} {value} has no effect without --share: leave it out")
    rows = _rows()
    if as_json:
        output.print_json({"profiles": rows})
        return
    columns = [("model", False), ("kind", False), ("for arms", False), ("layers x heads", True)]
    columns += [("interval", True), ("formats", False), ("configuration", False)]
    cells = [
        (
            row["model"],
            row["kind"],
            "best, best-bytes" if len(row["formats"]) > 1 else row["arm"],
            f"{row['layers']} x {row['kv_heads']}" if row["kv_heads"] else str(row["layers"]),
            str(row["interval"] or "-"),
            ", ".join(row["formats"]) or "-",
            row["config_hash"],
        )
        for row in rows
    ]
    console = output.stdout()
    console.print(output.grid(columns, cells, "Profiles that come with the package"))
    console.print(
        "\nAn arm that reads a profile uses the one of the model's architecture if --profile names "
        "none.",
        markup=False,
    )


def _rows() -> list[dict[str, Any]]:
    from reasonalloc.calibrated import CostProfile
    from reasonalloc.calibrated.shipped import shipped_files

    rows = []
    for file in shipped_files():
        made = file.load()
        cost = made if isinstance(made, CostProfile) else None
        rows.append(
            {
                "model": made.model_id,
                "kind": file.kind,
                "arm": "reasonalloc" if cost is None else "best",
                "config_hash": file.config_hash,
                "layers": made.layers,
                "kv_heads": None if cost is None else _number(cost.heads),
                "interval": None if cost is None else cost.interval,
                "window": None if cost is None else cost.window,
                "formats": [] if cost is None else cost.formats,
                "path": str(file.path),
            }
        )
    return rows


def _number(kv_heads: list[int]) -> int | list[int]:
    """KV heads of every layer, or of each where they differ."""
    return kv_heads[0] if len(set(kv_heads)) == 1 else kv_heads


def _share(file: str, name: str | None, out: str, as_json: bool) -> None:
    from reasonalloc.calibrated import open_calibrated
    from reasonalloc.calibrated.shipped import condensed, file_name

    made: Any = condensed(open_calibrated(file), name)
    folder = Path(out)
    if not folder.is_dir():
        raise UsageError(f"--out {out}: there is no such folder: make it, or give another one")
    path = folder / file_name(made)
    made.save(path)
    if as_json:
        output.print_json({"model": made.model_id, "path": str(path)})
        return
    output.stdout().print(
        f"{made.model_id}: {path} ({path.stat().st_size:,} bytes). To contribute it, add it to "
        "src/reasonalloc/shipped in a pull request.",
        markup=False,
        soft_wrap=True,
    )
