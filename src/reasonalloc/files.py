"""Files that are replaced whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reasonalloc.errors import UsageError


def as_path(name: str, value: Any) -> Path:
    """Return a path that a user gave, with ``~`` expanded.

    Args:
        name: of the argument, for the message.
        value: text or a path.

    Raises:
        UsageError: something else, or an empty text.
    """
    if not isinstance(value, (str, os.PathLike)) or not str(value).strip():
        raise UsageError(f"{name}={value!r} must be a path: give a text or a pathlib.Path")
    return Path(value).expanduser()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write to, which replaces ``path`` if nothing is raised.

    Else it is removed: half a page on a full disk helps nobody.
    """
    partial = path.with_name(path.name + ".part")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
