"""What leaves Python as an address, checked before C++ is called: it would only see bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reasonalloc.ops.native.structs import FLOATS


def address(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype | None,
    shape: Sequence[int],
    *,
    rows: bool = False,
) -> int:
    """Where a tensor lies that is what C++ takes it for.

    Args:
        name: of the argument, for the message.
        tensor: on the CPU and contiguous.
        dtype: that it must have; None: any of ``FLOATS``.
        shape: that it must have.
        rows: only its last dimension need be contiguous.

    Raises:
        RuntimeError: it is something else.
    """
    typed = tensor.dtype is dtype if dtype is not None else tensor.dtype in FLOATS
    laid = tensor.is_contiguous() or (rows and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1))
    if not (typed and laid and tensor.is_cpu and tensor.shape == tuple(shape)):
        wanted = "one of " + ", ".join(map(str, FLOATS)) if dtype is None else str(dtype)
        raise RuntimeError(
            f"{name} cannot be handed to C++: it must be {list(shape)} of {wanted}, "
            f"{'with contiguous rows' if rows else 'contiguous'}, on the CPU, but it is "
            f"{list(tensor.shape)} of {tensor.dtype} with strides {list(tensor.stride())} on "
            f"{tensor.device}"
        )
    return tensor.data_ptr()


def failure(code: int) -> Exception:
    """What a ``Failure`` of ``lanes.h`` says."""
    if code == 1:
        return MemoryError("not enough memory for the loops in C++")
    if code == 2:
        return RuntimeError("a run is full: compress before appending")
    if code == 3:
        return IndexError("a token id is not in the model's vocabulary")
    return RuntimeError("a length, an offset or an index points outside of the storage")
