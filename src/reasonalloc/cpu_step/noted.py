"""Whether two steps did the same: the same operations on the same memory with the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from reasonalloc.cpu_step.draft import storage_of
from reasonalloc.cpu_step.lowering import Call
from reasonalloc.errors import UnsupportedError


def check_same(
    result: Any, calls: Sequence[Call], other_result: Any, other_calls: Sequence[Call]
) -> None:
    """Compare what two runs of a step did and returned.

    Raises:
        UnsupportedError: a number or a shape differs, or a tensor is another one.
    """
    if len(calls) != len(other_calls):
        raise _differs(f"{len(calls)} operations, then {len(other_calls)}")
    twins = _Twins()
    for call, other in zip(calls, other_calls, strict=True):
        if call.func is not other.func:
            raise _differs(f"{call.func}, then {other.func}")
        twins.check((call.args, call.kwargs), (other.args, other.kwargs), call.func)
        twins.add(call.result, other.result, call.func)
    twins.check(result, other_result, "its result")


class _Twins:
    """Which memory of one run stands for which of the other."""

    def __init__(self) -> None:
        self._other: dict[int, int] = {}

    def check(self, tree: Any, other: Any, where: Any) -> None:
        """Compare arguments."""
        leaves, spec = tree_flatten(tree)
        others, other_spec = tree_flatten(other)
        if spec != other_spec:
            raise _differs(where)
        for a, b in zip(leaves, others, strict=True):
            if not (self._same(a, b) if isinstance(a, Tensor) else _equal(a, b)):
                raise _differs(where)

    def add(self, tree: Any, other: Any, where: Any) -> None:
        """Note results, which later arguments may be."""
        for a, b in zip(tree_leaves(tree), tree_leaves(other), strict=True):
            if isinstance(a, Tensor):
                if not (isinstance(b, Tensor) and _alike(a, b)):
                    raise _differs(where)
                if storage_of(a):
                    self._other.setdefault(storage_of(a), storage_of(b))

    def _same(self, a: Tensor, b: Any) -> bool:
        if not (isinstance(b, Tensor) and _alike(a, b)):
            return False
        if a.numel() == 0:
            return True
        known = self._other.get(storage_of(a))
        if known is not None:
            return known == storage_of(b)
        # Made before the step, or by the host from numbers of its own.
        self._other[storage_of(a)] = storage_of(b)
        return storage_of(a) == storage_of(b) or torch.equal(a, b)


def _equal(a: Any, b: Any) -> bool:
    # Objects in C++, such as packed weights, know no equality: only that they are the same.
    return a is b or (type(a) is type(b) and not isinstance(a, torch.ScriptObject) and a == b)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.stride(), a.dtype, a.storage_offset()) == (
        b.shape,
        b.stride(),
        b.dtype,
        b.storage_offset(),
    )


def _differs(where: Any) -> UnsupportedError:
    return UnsupportedError(
        "step='compile': a step of this model does not do the same every time, or computes with "
        f"numbers of the host that change ({where}): use step='eager'"
    )
