"""Files that are replaced whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
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


def check_not_read(
    name: str, target: str | os.PathLike[str], read: Iterable[str | os.PathLike[str]]
) -> None:
    """Refuse to write over a file that the same call reads.

    Args:
        name: of the argument, for the message.
        target: file to write.
        read: files that are read; those that are not there do not matter.

    Raises:
        UsageError: it is one of them.
    """
    wanted = Path(target).expanduser()
    for path in read:
        own = Path(path).expanduser()
        if wanted.resolve() == own.resolve() or (
            wanted.exists() and own.exists() and wanted.samefile(own)
        ):
            raise UsageError(
                f"{name}={os.fspath(target)!r} would write over {os.fspath(path)!r}, which is "
                "read: name another file"
            )


def lock(path: Path, taken: str) -> int:
    """Open a file, made if it is not there, that no other process locks; closing it unlocks it.

    Args:
        path: the file.
        taken: says that another process uses it.

    Returns:
        Its descriptor.

    Raises:
        OSError: it cannot be opened.
        UsageError: ``taken``.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with contextlib.suppress(ModuleNotFoundError):  # not on this system: no lock
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            raise UsageError(taken) from None
    return file


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
