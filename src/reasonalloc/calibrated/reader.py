"""The base of policies and layer allocators that read a calibrated file."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar

#: What messages call the kinds of calibrated files. A "profile" is a demand profile.
FileKind = Literal["profile", "cost profile", "statistics"]

R = TypeVar("R", bound="ReadsCalibrated")


@dataclass(frozen=True)
class ReadsCalibrated:
    """A part of an arm that reads a calibrated file, such as ``profile(path=FILE)``.

    Inherit from it first, so that ``path`` is the first parameter.

    Attributes:
        path: the file; "" if the run's ``profile`` is meant.
        reads: the kind of file.
    """

    path: str = ""
    reads: ClassVar[FileKind]

    def with_file(self: R, path: str | os.PathLike[str] | None) -> R:
        """Return this part with ``path`` filled in, unless it names a file or ``path`` is None."""
        return self if path is None or self.path else replace(self, path=os.fspath(path))
