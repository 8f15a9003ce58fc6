"""The files of a report: the page, and its tables beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reasonalloc.report.page import render, write
from reasonalloc.report.results import TEMPLATE
from reasonalloc.report.tables import cells_csv, markdown, paired_csv

#: Ends of the tables' names, after the page's own without ``.html``.
TABLES = (".md", ".csv", "-paired.csv")


def write_all(data: dict[str, Any], page: Path, tables: Sequence[Path]) -> None:
    """Write the page, and the tables in the order of ``TABLES``.

    Args:
        data: from ``results``.
        page, tables: files.

    Raises:
        UsageError: a file cannot be written.
    """
    write(page, render(data, TEMPLATE))
    texts = (markdown(data), cells_csv(data), paired_csv(data))
    for path, text in zip(tables, texts, strict=True):
        write(path, text)
