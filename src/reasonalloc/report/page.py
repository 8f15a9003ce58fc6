"""Self-contained HTML pages: no network, one copy of the plot library."""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reasonalloc.errors import UsageError
from reasonalloc.files import replacing

TEMPLATE = "page.html.j2"
_LIBRARIES = ("plotly", "jinja2")


def require_report(libraries: Sequence[str] = _LIBRARIES) -> None:
    """Refuse if a library of the extra ``report`` is missing.

    Args:
        libraries: what is needed.

    Raises:
        UsageError: says which, and what to install.
    """
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the page needs {' and '.join(missing)}: pip install 'reasonalloc[report]'"
        )


def check_writable(path: str | os.PathLike[str], option: str = "--out") -> Path:
    """The absolute path of a file that can be written, found out without touching it.

    Raises:
        UsageError: it is a folder, its folder is missing, or it may not be written.
    """
    target = Path(path).expanduser().resolve()
    if target.is_dir():
        raise UsageError(f"{option} {str(path)!r} is a folder: name a file")
    if not target.parent.is_dir():
        raise UsageError(f"{option} {str(path)!r}: there is no folder {str(target.parent)!r}")
    if target.exists() and not os.access(target, os.W_OK):
        raise UsageError(f"{option} {str(path)!r} may not be written: name another file")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise UsageError(f"{option} {str(path)!r} cannot be written: {error.strerror}") from None
    return target


def render(data: dict[str, Any], template: str = TEMPLATE) -> str:
    """The page's HTML.

    Args:
        template: file in this folder.
        data: facts, rows and traces as the template's comment at the top describes them;
            the page finds them as JSON under the id ``data``.
    """
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        data=data,
        payload=Markup(script_json(data)),
        library=Markup(get_plotlyjs()),
    )


def script_json(data: dict[str, Any]) -> str:
    """JSON that can stand in a ``<script>``: nothing in it can end the element or open another."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def write(path: Path, html: str, option: str = "--out") -> None:
    """Write the page, replacing ``path`` only once everything is written.

    Raises:
        UsageError: the disk is full or the folder is gone.
    """
    try:
        with replacing(path) as partial:
            partial.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{option} {str(path)!r} cannot be written: {error.strerror}") from None
