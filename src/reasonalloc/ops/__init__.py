"""Operations that have a plain and a compiled implementation, chosen once with the backend.

``torch`` is the reference, ``native`` the loops in C++. Nobody looks at which of them could run:
whoever builds a cache asks ``choose_operations`` and hands the object down, so that the same code
runs whatever else a process has compiled.
"""

from reasonalloc.ops.interface import Operations
from reasonalloc.ops.torch import TORCH

__all__ = ["TORCH", "Operations", "choose_operations"]


def choose_operations(native: bool) -> Operations:
    """Return the operations of a cache.

    Args:
        native: the loops in C++, for tensors on a CPU; compiled on first use.
    """
    if not native:
        return TORCH
    from reasonalloc.ops.native.operations import NATIVE

    return NATIVE
