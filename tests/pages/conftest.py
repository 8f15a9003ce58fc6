"""The browser, and the pages that it opens."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from browser import Browser
    from made_pages import Pages

_NEEDED = ("chromium", "chromedriver")


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium; where it is missing, tests are skipped, but in CI they fail."""
    paths = [shutil.which(name) for name in _NEEDED]
    if None in paths:
        why = "the pages need a browser: apt-get install chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(why)
        pytest.skip(why)
    from browser import started

    with started(*map(str, paths), tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Pages:
    """Every page, made when it is first asked for."""
    for library in ("typer", "plotly", "jinja2", "scipy"):
        pytest.importorskip(library)
    from made_pages import Pages

    return Pages(tmp_path_factory.mktemp("pages"))
