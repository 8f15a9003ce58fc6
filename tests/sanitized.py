"""The loops in C++ with AddressSanitizer and UndefinedBehaviorSanitizer; see ``make sanitize``."""

from __future__ import annotations

import os

from reasonalloc.cpu_step import compiled
from reasonalloc.cpu_step.program import Arena
from reasonalloc.ops.native import build

_FLAGS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g1",
)


def prepare() -> None:
    """Have the loops built with sanitizers in this process, which must have loaded theirs first."""
    os.environ.pop("LD_PRELOAD", None)  # the compiler itself need not run under it
    build._FLAGS = (*build._FLAGS, *_FLAGS)
    # In one arena nobody sees an instruction leave its tensor: each stays in memory of its own.
    compiled.Arena = lambda drafts, inner: Arena(drafts, set())  # type: ignore[misc, assignment]
