"""Decode steps as compiled code: operations are noted once, cut by layers, and compiled."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from reasonalloc.errors import UnsupportedError
from reasonalloc.native.build import compiler_message

_aten = torch.ops.aten
#: What they return is a number of the host, which would stay as it was when it was noted.
READS = (
    _aten._local_scalar_dense,
    _aten.nonzero,
    _aten.is_nonzero,
    _aten.equal,
    _aten.masked_select,
)

Compiled = Callable[..., Sequence[Tensor]]

_OPTIONS = {"size_asserts": False}
# Of this process: pieces that differ in their tensors alone are the same function.
_known: dict[tuple[Any, ...], Compiled] = {}
_MOST_KNOWN = 1024


@dataclass
class _Piece:
    """Operations between two cuts, as (operator, arguments, keywords, result)."""

    calls: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)

    def tensors(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Those that it takes from elsewhere, and those that it makes, in order, by ``id``."""
        taken: dict[int, Tensor] = {}
        made: dict[int, Tensor] = {}
        for _, args, kwargs, result in self.calls:
            for tensor in _tensors((args, kwargs)):
                if id(tensor) not in made:
                    taken[id(tensor)] = tensor
            for tensor in _tensors(result):
                if id(tensor) not in taken:  # else changed in place
                    made[id(tensor)] = tensor
        return taken, made

    def signature(self, taken: Sequence[int], given: Sequence[int]) -> tuple[Any, ...]:
        """The calls, tensors as numbers in the order of appearance, and the numbers of ``given``.

        Functions with one signature are the same; made in a fraction of the time of ``graph``.
        """
        names = {key: i for i, key in enumerate(taken)}

        def plain(x: Any) -> Any:
            if isinstance(x, Tensor):
                return Tensor, names.setdefault(id(x), len(names))
            if isinstance(x, (list, tuple)):
                return tuple(map(plain, x))
            if isinstance(x, dict):
                return tuple((key, plain(value)) for key, value in x.items())
            if isinstance(x, float):
                return float, repr(x)  # 0.0 is not -0.0, nan is nan
            return type(x), x  # 1 is not True

        calls = tuple((call[0], *map(plain, call[1:])) for call in self.calls)
        return calls, tuple(names[key] for key in given)

    def graph(self, taken: Sequence[int], given: Sequence[int]) -> fx.GraphModule:
        """A function of the tensors ``taken`` that returns those ``given``."""
        graph = fx.Graph()
        nodes = {key: graph.placeholder(f"x{i}") for i, key in enumerate(taken)}

        def node(x: Any) -> Any:
            return nodes[id(x)] if isinstance(x, Tensor) else x

        for call, args, kwargs, result in self.calls:
            made = graph.call_function(call, tree_map(node, args), tree_map(node, kwargs))
            if isinstance(result, Tensor):
                nodes[id(result)] = made
                continue
            for i, part in enumerate(result if isinstance(result, (list, tuple)) else ()):
                if isinstance(part, Tensor):
                    nodes[id(part)] = graph.call_function(operator.getitem, (made, i))
        graph.output(tuple(nodes[key] for key in given))
        return fx.GraphModule(torch.nn.Module(), graph)


class _Notes(TorchDispatchMode):
    """Takes note of every operation while it runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pieces = [_Piece()]

    def cut(self) -> None:
        """What follows is a piece of its own."""
        self.pieces.append(_Piece())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in READS:
            raise UnsupportedError(
                f"step='compile': a step of this model reads numbers back ({func}), which cannot "
                "be compiled: use step='eager'"
            )
        result = func(*args, **(kwargs or {}))
        self.pieces[-1].calls.append((func, args, kwargs or {}, result))
        return result


def compile_step(run: Callable[[Callable[[], None]], Any]) -> Callable[[], Any]:
    """Run a step, and return what repeats it on the same memory, compiled by Inductor.

    The step is noted while it runs, as a list of operations, cut where a layer begins to
    attend. Pieces that differ in their tensors alone, as those of equal layers, are compiled
    once: weights, cache and activations are arguments.

    Args:
        run: does the step; calls its argument where a layer begins to attend.

    Returns:
        The first call returns what ``run`` returned, without doing anything; every other one
        repeats the step and returns the like with new tensors.

    Raises:
        UnsupportedError: the step reads numbers back, or cannot be compiled.
    """
    notes = _Notes()
    with torch.inference_mode(False), torch.no_grad():
        with notes:
            result = run(notes.cut)
        return _bind(notes.pieces, result)


def _bind(pieces: list[_Piece], result: Any) -> Callable[[], Any]:
    parts = [piece.tensors() for piece in pieces]
    made_somewhere = {key for _, made in parts for key in made}
    leaves, spec = tree_flatten(result)
    results = [id(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
    wanted = set(results)
    gives: list[list[int]] = []
    for taken, made in reversed(parts):
        gives.append([key for key in made if key in wanted])
        wanted |= set(taken)
    gives.reverse()
    # What no piece makes stays; the rest is replaced by every repetition.
    values = {k: t for taken, _ in parts for k, t in taken.items() if k not in made_somewhere}
    steps = []
    for piece, (taken, _), given in zip(pieces, parts, gives, strict=True):
        compiled = _compile(piece, taken, given)
        steps.append((compiled, list(taken), given))
    first = [result]

    def replay() -> Any:
        if first:
            return first.pop()
        with torch.inference_mode(False), torch.no_grad():
            for compiled, taken, given in steps:
                found = compiled(*[values[key] for key in taken])
                values.update(zip(given, found, strict=True))
        fresh = iter([values[key] for key in results])
        return tree_unflatten(
            [next(fresh) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        )

    return replay


def _compile(piece: _Piece, taken: dict[int, Tensor], given: list[int]) -> Compiled:
    storages: dict[int, int] = {}
    inputs = list(taken.values())
    key = (
        piece.signature(list(taken), given),
        torch.get_num_threads(),  # is compiled in, and so is the next
        torch.get_default_dtype(),
        *(
            (
                *(t.shape, t.stride(), t.storage_offset(), t.dtype),
                storages.setdefault(t.untyped_storage().data_ptr(), len(storages)),
            )
            for t in inputs
        ),
    )
    if key not in _known:
        log = logging.getLogger("torch._subclasses.fake_tensor")  # repeats errors, with traces
        disabled, log.disabled = log.disabled, True
        try:
            module = piece.graph(list(taken), given)
            found = torch._inductor.compile(module, [*inputs], options=_OPTIONS)
        except Exception as error:
            raise UnsupportedError(
                "step='compile': a step of this model cannot be compiled "
                f"({compiler_message(error)}): use step='eager'"
            ) from error
        finally:
            log.disabled = disabled
        if not callable(found):
            raise RuntimeError(f"Inductor returned a {type(found).__name__}")
        while len(_known) >= _MOST_KNOWN:
            del _known[next(iter(_known))]
        _known[key] = found
    return _known[key]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
