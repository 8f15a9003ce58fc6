"""ReasonAlloc: a fixed KV-cache budget for reasoning models while they decode.

with reasonalloc.attach(model, budget=1024):
    model.generate(**inputs, max_new_tokens=8192)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reasonalloc.config import Arm
from reasonalloc.errors import (
    CompressionNeverHappened,
    OtherCadence,
    ReasonAllocError,
    UnsupportedError,
    UsageError,
)
from reasonalloc.version import __version__

if TYPE_CHECKING:
    from reasonalloc.integrations.hf import Attachment, BudgetCache, attach, detach

__all__ = [
    "Arm",
    "Attachment",
    "BudgetCache",
    "CompressionNeverHappened",
    "OtherCadence",
    "ReasonAllocError",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "attach",
    "detach",
]

_LAZY = ("Attachment", "BudgetCache", "attach", "detach")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from reasonalloc.integrations import hf

        return getattr(hf, name)
    raise AttributeError(f"module 'reasonalloc' has no attribute {name!r}")
