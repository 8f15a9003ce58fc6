"""Decode steps on a CPU as programs: operations are noted once, and run by loops in C++."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from reasonalloc.cpu_step.draft import Draft, storage_of
from reasonalloc.cpu_step.lowering import Call, drafts_of
from reasonalloc.cpu_step.noted import check_same
from reasonalloc.cpu_step.products import one_panel_each
from reasonalloc.cpu_step.program import Arena, Program
from reasonalloc.errors import UnsupportedError

_aten = torch.ops.aten
#: What they return is a number of the host, which would stay as it was when it was noted.
READS = (
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.is_nonzero,
    _aten.equal,
    _aten.allclose,
    _aten.masked_select,
)
# Of products that stay PyTorch's, those that write where they are told to.
_INTO = {
    _aten.mm.default: _aten.mm.out,
    _aten.addmm.default: _aten.addmm.out,
    _aten.bmm.default: _aten.bmm.out,
}


class _Notes(TorchDispatchMode):
    """Takes note of every operation while it runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in READS or _gives_numbers(func):
            raise _reads(func)
        result = func(*args, **(kwargs or {}))
        self.calls.append(Call(func, args, kwargs or {}, result))
        return result


@functools.cache
def _gives_numbers(func: Any) -> bool:
    """Whether an operation returns numbers of the host that depend on what tensors hold."""
    if torch.Tag.data_dependent_output in func.tags:
        return True
    if func.namespace == "aten":  # its others tell of shapes, types and strides
        return False
    return any(str(r.type) in ("int", "float", "bool", "number") for r in func._schema.returns)


class _NoReads(TorchFunctionMode):
    """Refuses what reads numbers without an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READERS or (func in _READERS_OF_LISTS and _reads_arguments(args, kwargs)):
            raise _reads(getattr(func, "__name__", func))
        return func(*args, **(kwargs or {}))


_READERS = (
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.data_ptr,
    Tensor.__repr__,
)
# These read tensors in lists, and tensors of places, without an operation.
_READERS_OF_LISTS = (
    torch.tensor,
    torch.as_tensor,
    torch.asarray,
    Tensor.new_tensor,
    torch.tensor_split,
    Tensor.tensor_split,
)


def _reads_arguments(args: Sequence[Any], kwargs: dict[str, Any] | None) -> bool:
    first, *others = [*args, *(kwargs or {}).values()]
    inside = [] if isinstance(first, Tensor) else [first]
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves([*inside, *others]))


def _reads(operation: Any) -> UnsupportedError:
    return UnsupportedError(
        f"step='compile': a step of this model reads numbers back ({operation}), which cannot be "
        "compiled: use step='eager'"
    )


def compile_step(run: Callable[[], Any], verify: bool = False) -> Callable[[], Any]:
    """Run a step, and return what repeats it on the same memory.

    The step is noted while it runs, as a list of operations. Those that ``native.lowering`` knows
    become instructions of a program, which a team of threads runs in one go; all others are
    repeated by PyTorch, in their place.

    Numbers of the host would stay as they were. Reads are refused where they can be seen; what
    cannot be seen (a counter, memory that is read by its address) is found by ``verify``.

    Args:
        run: does the step.
        verify: run the second step once more by PyTorch, and compare what the two did.

    Returns:
        The first call returns what ``run`` returned, without doing anything; every other one
        repeats the step (the second one runs it, under ``verify``) and returns the like with new
        tensors.

    Raises:
        UnsupportedError: the step reads numbers back, or (from the second call) does not do the
            same every time.
    """
    result, calls = _noted(run)
    leaves, spec = tree_flatten(result)
    with torch.inference_mode(False), torch.no_grad():
        steps = _steps(calls, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
    first = [(result, calls)] if verify else []  # until the second call
    started = False

    def replay() -> Any:
        nonlocal started
        results = leaves
        with torch.inference_mode(False), torch.no_grad():
            if started and first:
                again = _noted(run)
                check_same(*first.pop(), *again)
                results = tree_leaves(again[0])
            elif started:
                for step in steps:
                    step()
            started = True
            fresh = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in results]
        return tree_unflatten(fresh, spec)

    return replay


def _noted(run: Callable[[], Any]) -> tuple[Any, list[Call]]:
    """Run a step: what it returned, and its operations."""
    notes = _Notes()
    with torch.inference_mode(False), torch.no_grad(), _NoReads(), notes:
        result = run()
    return result, notes.calls


def _steps(calls: Sequence[Call], results: Sequence[Tensor]) -> list[Callable[[], None]]:
    """What repeats the calls, those of no consequence left out."""
    touched = [(_storages(c.args) | _storages(c.kwargs), _storages(c.result)) for c in calls]
    made: set[int] = set().union(*(outputs - inputs for inputs, outputs in touched))
    wanted = {storage_of(t) for t in results}
    fixed = set(wanted)  # what PyTorch reads or writes stays where it is
    kept: list[list[Draft] | Call] = []
    for call, (inputs, outputs) in zip(reversed(calls), reversed(touched), strict=True):
        view = outputs <= inputs
        idle = not call.func._schema.is_mutable and (view or outputs.isdisjoint(wanted))
        if idle and not _shape_depends(call):
            continue
        wanted |= inputs | outputs
        drafts = drafts_of(call)
        if drafts is None:
            fixed |= inputs | outputs
        kept.append(call if drafts is None else drafts)
    kept.reverse()
    parts: list[list[Draft] | Call] = []  # what is run by PyTorch, and lists of drafts between
    for drawn, group in groupby(kept, lambda entry: isinstance(entry, list)):
        if drawn:
            parts.append(one_panel_each([d for e in group if isinstance(e, list) for d in e]))
        else:
            parts += group
    every = [draft for part in parts if isinstance(part, list) for draft in part]
    made = made.union(*(draft.temporary for draft in every))
    arena = Arena(every, made - fixed - {0})
    return [
        Program(part, arena).run if isinstance(part, list) else _repetition(part) for part in parts
    ]


def _shape_depends(call: Call) -> bool:
    """Whether the shape of a result depends on what tensors hold: it must be looked at then."""
    if torch.Tag.dynamic_output_shape not in call.func.tags:
        return False
    if call.func.overloadpacket is not _aten.index:
        return True
    return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in call.args[1])


def _repetition(call: Call) -> Callable[[], None]:
    """Return what repeats an operation by PyTorch, into the tensors that it wrote."""
    into = _INTO.get(call.func)
    if into is not None:
        return lambda: into(*call.args, **call.kwargs, out=call.result)
    inputs = _storages(call.args) | _storages(call.kwargs)
    targets = [
        (i, leaf)
        for i, leaf in enumerate(tree_leaves(call.result))
        if isinstance(leaf, Tensor) and storage_of(leaf) not in inputs
    ]

    def repeat() -> None:
        result = call.func(*call.args, **call.kwargs)
        if targets:
            leaves = tree_leaves(result)
            for i, target in targets:
                if leaves[i].shape != target.shape:
                    raise UnsupportedError(
                        "step='compile': the shape of a result changes from step to step "
                        f"({call.func}): use step='eager'"
                    )
                target.copy_(leaves[i])

    return repeat


def _storages(tree: Any) -> set[int]:
    """Of all tensors in arguments or results of an operation."""
    if isinstance(tree, Tensor):
        return {storage_of(tree)}
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (list, tuple)):
        return set()
    return set().union(*map(_storages, tree))
