"""Self-contained HTML pages: no network, one copy of the plot library."""

from __future__ import annotations

import importlib.util
import json
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
