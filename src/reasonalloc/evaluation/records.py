"""Append-only result files: a manifest, then one JSON line per finished piece of work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from reasonalloc.errors import UsageError
from reasonalloc.files import replacing

Row = dict[str, Any]


class ResultFile:
    """Results that survive a kill: what is in the file is not computed again.

    A line that was cut off by a kill is dropped. A file made with other settings is refused.

    Args:
        path: the file; made if it is not there.
        manifest: the settings that all results share, JSON values only.
        keep: what is held in memory of each row, in ``rows``; None: all of it.
        grows: settings that are objects whose entries may be added and not changed.
        free: settings that may change: the latest stays, of an object every entry's latest.
        absent: values of settings that older files do not hold.

    Raises:
        UsageError: the file cannot be used; names the setting that differs.
    """

    def __init__(
        self,
        path: Path,
        manifest: Row,
        keep: Callable[[Row], Row] | None = None,
        grows: Collection[str] = (),
        free: Collection[str] = (),
        absent: Row | None = None,
    ) -> None:
        self._path, self._keep = path, keep or _whole
        self._grows, self._free = grows, free
        self.rows: list[Row] = []
        manifest = json.loads(json.dumps(manifest))
        try:
            first, end = self._read()
            if first is None:
                self._begin(manifest, 0)
                return
            merged = self._merge((absent or {}) | first["manifest"], manifest)
            if end != path.stat().st_size:
                os.truncate(path, end)  # the line that was being written when it was killed
            if merged != first["manifest"]:
                self._begin(merged, self._header)
        except OSError as error:
            raise UsageError(f"out={str(path)!r} cannot be used: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"out={str(path)!r} is no file of such results ({error}): give another file"
            ) from None

    def _read(self) -> tuple[Row | None, int]:
        """The first line, if there is one, and the bytes of all whole lines; fills ``rows``."""
        first: Row | None = None
        end = self._header = 0
        if not self._path.exists():
            return None, 0
        with self._path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    start = b'{"manifest"'
                    if first is None and line[: len(start)] != start[: len(line)]:
                        raise ValueError("it has no manifest")
                    break
                end += len(line)
                if first is None:
                    first, self._header = json.loads(line), end
                else:
                    self.rows.append(self._keep(json.loads(line)))
        return first, end

    def _merge(self, stored: Row, manifest: Row) -> Row:
        merged = dict(stored)
        for name in sorted({*stored, *manifest}):
            old, new = stored.get(name), manifest.get(name)
            if isinstance(old, dict) and isinstance(new, dict):
                merged[name] = old | new
            else:
                merged[name] = new
            if name in self._grows and isinstance(old, dict) and isinstance(new, dict):
                for entry in sorted(old.keys() & new.keys()):
                    self._check(f"{name} of {entry}", old[entry], new[entry])
            elif name not in self._free:
                self._check(name, old, new)
        return merged

    def _check(self, name: str, old: Any, new: Any) -> None:
        if old != new:
            raise UsageError(
                f"out={str(self._path)!r} was made with {name}={old!r}, now it is {new!r}: "
                "give another file, or the same settings"
            )

    def _begin(self, manifest: Row, skip: int) -> None:
        """Write a first line; what follows the old one of ``skip`` bytes stays."""
        with replacing(self._path) as partial, partial.open("wb") as file:
            file.write((json.dumps({"manifest": manifest}) + "\n").encode())
            if skip:
                with self._path.open("rb") as old:
                    old.seek(skip)
                    while block := old.read(1 << 20):
                        file.write(block)
            file.flush()
            os.fsync(file.fileno())

    def read_again(self) -> list[Row]:
        """What is on disk now, as in ``rows``: Ctrl-C may come between the disk and ``rows``."""
        self.rows = []
        self._read()
        return self.rows

    def add(self, *rows: Row) -> None:
        """Append results and make sure that they are on disk."""
        append_lines(self._path, rows)
        self.rows.extend(self._keep(row) for row in rows)


def append_lines(path: Path, rows: Sequence[Row]) -> None:
    """Append JSON lines all at once, or, if that fails, nothing.

    Raises:
        UsageError: the file cannot be written.
    """
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            before = os.fstat(file).st_size
            try:
                while data:
                    data = data[os.write(file, data) :]
                os.fsync(file)
            except BaseException as error:  # Ctrl-C as well, unless all of it is there
                if data or isinstance(error, OSError):
                    os.ftruncate(file, before)
                raise
        finally:
            os.close(file)
    except OSError as error:
        raise UsageError(
            f"out={str(path)!r} cannot be written: {error.strerror}; what is in it is "
            "complete, so start again once that is mended"
        ) from None


def _whole(row: Row) -> Row:
    return row
