"""Append-only result files: a manifest, then one JSON line per finished piece of work."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from reasonalloc.errors import UsageError


class ResultFile:
    """Results that survive a kill: what is in the file is not computed again.

    A line that was cut off by a kill is dropped. A file made with other settings is refused.

    Args:
        path: the file; made if it is not there.
        manifest: the settings that all results share, JSON values only.

    Raises:
        UsageError: the file cannot be used; names the setting that differs.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        manifest = json.loads(json.dumps(manifest))
        try:
            lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
            whole = [line for line in lines if line.endswith("\n")]
            if whole:
                self._check(json.loads(whole[0]), manifest)
                self.rows = [json.loads(line) for line in whole[1:]]
            if len(whole) != len(lines) or not whole:
                self._rewrite(manifest)
        except OSError as error:
            raise UsageError(f"out={str(path)!r} cannot be used: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"out={str(path)!r} is no file of such results ({error}): give another file"
            ) from None

    def _check(self, first: dict[str, Any], manifest: dict[str, Any]) -> None:
        found = first["manifest"]
        for name in sorted({*found, *manifest}):
            if found.get(name) != manifest.get(name):
                raise UsageError(
                    f"out={str(self._path)!r} was made with {name}={found.get(name)!r}, now it is "
                    f"{manifest.get(name)!r}: give another file, or the same settings"
                )

    def _rewrite(self, manifest: dict[str, Any]) -> None:
        partial = self._path.with_name(self._path.name + ".part")
        lines = [{"manifest": manifest}, *self.rows]
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        partial.replace(self._path)

    def add(self, row: dict[str, Any]) -> None:
        """Append a result and make sure that it is on disk."""
        self.rows.append(row)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UsageError(
                f"out={str(self._path)!r} cannot be written: {error.strerror}; what is in it is "
                "complete, so start again once that is mended"
            ) from None
