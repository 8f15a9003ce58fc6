"""The decode step of CPUs as one program of our own loops: ``step="compile"``.

``integrations.hf.step`` opens this folder when such steps are asked for; nothing else imports it.
"""

from __future__ import annotations

import torch

from reasonalloc.cpu_step import build
from reasonalloc.cpu_step.compiled import compile_step
from reasonalloc.ops.native.build import require

__all__ = ["check", "compile_step"]


def check(dtype: torch.dtype) -> None:
    """Make sure that compiled steps can run.

    Args:
        dtype: of the model.

    Raises:
        UsageError: there is no C++ compiler.
        UnsupportedError: it cannot compile the loops, or they do not know the type.
    """
    require("step='compile'", "step='eager'", dtype, lambda: build.library())
