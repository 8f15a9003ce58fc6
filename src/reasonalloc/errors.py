"""Exceptions that a user may see; every message names what was given and what to do instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ReasonAllocError(Exception):
    """Base class of all errors raised on purpose by this library."""


class UsageError(ReasonAllocError, ValueError):
    """A wrong argument, file or option. The command line turns it into exit code 2."""


class UnsupportedError(ReasonAllocError, NotImplementedError):
    """A model or a generation mode that cannot work under a KV budget."""


class NothingToBudget(UnsupportedError):
    """A model without a KV cache that grows: no causal attention over its own text, or bounded."""


class CompressionNeverHappened(UserWarning):
    """Compression was asked for, but no sequence ever grew past its budget."""


class UntestedVersion(UserWarning):
    """The installed transformers is newer than every release that was tested."""


class OtherCadence(UserWarning):
    """A cost profile was measured at another interval or window than the run's."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """Error for an unknown ``name`` that suggests the nearest of the ``known`` ones."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UsageError(f"unknown {kind} {name!r}: {hint}choose one of {', '.join(names)}")
