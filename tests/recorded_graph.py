"""A CUDA graph without a GPU: operations are noted once and repeated on the same memory.

As under a real graph, whatever the host computed while it was noted stays as it was, every tensor
keeps its address, and a number that the host reads back cannot be noted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reasonalloc.cpu_step.compiled import READS


class _Notes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in READS:
            raise RuntimeError(f"{func} waits for the device")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def capture(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """As ``graphs.capture``; noting executes, so the first replay does not."""
    notes = _Notes()
    with notes:
        result = run()
    first = [True]

    def replay() -> Any:
        if first:
            first.clear()
            return result
        for func, args, kwargs, out in notes.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return result

    return replay
