"""PyTorch operations of a noted decode step as instructions of ``program.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reasonalloc.cpu_step.draft import LINE, Draft
from reasonalloc.cpu_step.elementwise import elementwise, loops_of
from reasonalloc.cpu_step.products import product
from reasonalloc.cpu_step.structs import KINDS, Operation, Share
from reasonalloc.ops.native.attention import NewToken, arguments_of
from reasonalloc.ops.native.coded import CodedInput
from reasonalloc.ops.native.coded import arguments_of as coded_arguments_of
from reasonalloc.ops.native.structs import FLOATS, Attend

_aten = torch.ops.aten


class Call(NamedTuple):
    """An operation that was run, with what it was given and what it gave."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


def drafts_of(call: Call) -> list[Draft] | None:
    """Instructions with the same effect, or None where there are none."""
    rule = _RULES.get(call.func)
    if rule is None or not call.kwargs.keys() <= _keywords(call.func):
        return None
    return rule(call)


@functools.cache
def _keywords(func: Any) -> frozenset[str]:
    """Arguments that can only be given by name; rules expect the others by position."""
    return frozenset(a.name for a in func._schema.arguments if a.kwarg_only)


def _unary(operation: Operation, call: Call) -> list[Draft] | None:
    return elementwise(operation, call.result, call.args[0])


def _binary(operation: Operation, call: Call) -> list[Draft] | None:
    a, b = call.args[:2]
    alpha = call.args[2] if len(call.args) > 2 else call.kwargs.get("alpha", 1)
    out = call.result
    if not isinstance(a, Tensor) or isinstance(b, complex) or isinstance(alpha, complex):
        return None
    if isinstance(b, Tensor):
        return elementwise(operation, out, a, b, factor=float(alpha))
    if out.dtype is torch.int64 and a.dtype is torch.int64 and operation is Operation.ADD:
        if not (out.is_contiguous() and a.is_contiguous() and isinstance(b, int)):
            return None
        sizes = (1, 1, 1, out.numel())
        number = float(b * alpha)
        return [Draft(Operation.COUNT, sizes, (out, LINE), (a, LINE), number=number)]
    return elementwise(operation, out, a, number=float(b), factor=float(alpha))


def _power(call: Call) -> list[Draft] | None:
    base, exponent = call.args[:2]
    if exponent == 2:
        return elementwise(Operation.SQUARE, call.result, base)
    return elementwise(Operation.POWER, call.result, base, number=float(exponent))


def _gelu(call: Call) -> list[Draft] | None:
    tanh = call.kwargs.get("approximate", "none") == "tanh"
    return _unary(Operation.GELU_TANH if tanh else Operation.GELU, call)


def _copy_into(call: Call) -> list[Draft] | None:
    out, source = call.args[:2]
    return elementwise(Operation.COPY, out, source)


def _sum(call: Call) -> list[Draft] | None:
    x, dims = call.args[0], call.args[1]
    keep = call.args[2] if len(call.args) > 2 else False
    out = call.result
    if not dims or x.dim() == 0 or x.dtype not in FLOATS or out.dtype not in FLOATS:
        return None
    dims = sorted(d % x.dim() for d in dims)
    if not keep:
        for d in dims:
            out = out.unsqueeze(d)
    if all(x.shape[d] == 1 for d in dims):
        return elementwise(Operation.COPY, out, x)
    if dims != [x.dim() - 1] or out.numel() == 0 or x.numel() == 0:
        return None
    strides = [out.stride()[:-1], x.stride()[:-1]]
    loops = loops_of(x.shape[:-1], strides, 3, x.numel())
    if loops is None:
        return None
    sizes, (of_out, of_x), share = loops
    factor = 1.0 / x.shape[-1] if call.func is _aten.mean.dim else 1.0
    return [
        Draft(
            Operation.SUM,
            (*sizes, x.shape[-1]),
            (out, (*of_out, 0)),
            (x, (*of_x, x.stride(-1))),
            share=share,
            factor=factor,
        )
    ]


def _cat(call: Call) -> list[Draft] | None:
    parts = call.args[0]
    dim = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)
    drafts: list[Draft] = []
    start = 0
    for part in parts:
        if part.numel() == 0:
            continue
        own = call.result.narrow(dim, start, part.shape[dim])
        start += part.shape[dim]
        copies = elementwise(Operation.COPY, own, part)
        if copies is None:
            return None
        drafts += copies
    return drafts


def _embedding(call: Call) -> list[Draft] | None:
    weight, places = call.args[:2]
    out = call.result
    if not (
        places.dtype is torch.int64
        and places.is_contiguous()
        and weight.is_contiguous()
        and weight.dtype in KINDS
        and out.is_contiguous()
        and out.numel() > 0
    ):
        return None
    row = weight.shape[1] * weight.element_size()
    sizes = (weight.shape[0], places.numel(), row, 0)
    return [Draft(Operation.EMBED, sizes, (out, LINE), (weight, LINE), (places, LINE))]


def _product(call: Call) -> list[Draft] | None:
    if call.kwargs not in ({}, {"beta": 1, "alpha": 1}):
        return None
    *bias, x, w = call.args
    return product(x, w, bias[0] if bias else None, call.result)


def _attend(call: Call) -> list[Draft] | None:
    query, keys, values, offsets, lengths, *how, need_weights = call.args
    scaling, softcap, sinks, *token = how
    new, (out, received) = NewToken(*token), call.result
    rows = (query, new.key, new.value)
    if any(t.stride(-1) != 1 for t in rows) or not offsets.is_contiguous():
        return None

    def arguments(placed: Callable[[Tensor], Tensor]) -> Attend:
        return arguments_of(
            placed(query),
            keys,
            values,
            placed(offsets),
            lengths,
            scaling,
            softcap,
            new._replace(key=placed(new.key), value=placed(new.value), seen=placed(new.seen)),
            placed(out),
            placed(received) if need_weights else None,
            None if sinks is None else placed(sinks),
        )

    changed = [keys, values, lengths, new.positions, new.state, new.ring]
    writes = [out, *(t for t in changed if t is not None), *([received] if need_weights else [])]
    return [
        Draft(
            Operation.ATTEND,
            (0, 0, 0, 0),
            share=Share.BLOCKS,
            reads=[*rows, offsets, new.seen, *([] if sinks is None else [sinks])],
            writes=writes,
            attend=arguments,
        )
    ]


def _attend_coded(call: Call) -> list[Draft] | None:
    query, *rest, need_weights = call.args
    count = len(CodedInput._fields)
    read, (scaling, softcap, sinks, *token) = CodedInput(*rest[:count]), rest[count:]
    new, (out, received) = NewToken(*token), call.result
    rows, tables = (query, new.key, new.value), (read.starts, read.offsets, read.lengths)
    if any(t.stride(-1) != 1 for t in rows) or not all(t.is_contiguous() for t in tables):
        return None

    def arguments(placed: Callable[[Tensor], Tensor]) -> Attend:
        starts, offsets, lengths = map(placed, tables)
        return coded_arguments_of(
            placed(query),
            read._replace(starts=starts, offsets=offsets, lengths=lengths),
            scaling,
            softcap,
            new._replace(key=placed(new.key), value=placed(new.value), seen=placed(new.seen)),
            placed(out),
            placed(received) if need_weights else None,
            None if sinks is None else placed(sinks),
        )

    changed = [read.tail_keys, read.tail_values, read.tail_lengths]
    changed += [t for t in (new.positions, new.state, new.ring) if t is not None]
    return [
        Draft(
            Operation.ATTEND_CODED,
            (0, 0, 0, 0),
            share=Share.BLOCKS,
            reads=[*rows, *tables, read.pool, new.seen, *([] if sinks is None else [sinks])],
            writes=[out, *changed, *([received] if need_weights else [])],
            attend=arguments,
        )
    ]


_RULES: dict[Any, Callable[[Call], list[Draft] | None]] = {
    _aten._to_copy.default: partial(_unary, Operation.COPY),
    _aten.clone.default: partial(_unary, Operation.COPY),
    _aten.copy_.default: _copy_into,
    _aten.neg.default: partial(_unary, Operation.NEGATE),
    _aten.cos.default: partial(_unary, Operation.COSINE),
    _aten.sin.default: partial(_unary, Operation.SINE),
    _aten.rsqrt.default: partial(_unary, Operation.INVERSE_ROOT),
    _aten.sigmoid.default: partial(_unary, Operation.LOGISTIC),
    _aten.silu.default: partial(_unary, Operation.SILU),
    _aten.gelu.default: _gelu,
    _aten.tanh.default: partial(_unary, Operation.TANH),
    _aten.exp.default: partial(_unary, Operation.EXP),
    _aten.relu.default: partial(_unary, Operation.RELU),
    _aten.pow.Tensor_Scalar: _power,
    _aten.mean.dim: _sum,
    _aten.sum.dim_IntList: _sum,
    _aten.cat.default: _cat,
    _aten.embedding.default: _embedding,
    _aten.mm.default: _product,
    _aten.addmm.default: _product,
    torch.ops.reasonalloc.ragged_step.default: _attend,
    torch.ops.reasonalloc.coded_step.default: _attend_coded,
}
for _name, _operation in (
    ("add", Operation.ADD),
    ("sub", Operation.SUBTRACT),
    ("mul", Operation.MULTIPLY),
    ("div", Operation.DIVIDE),
):
    for _packet in (getattr(_aten, _name), getattr(_aten, _name + "_")):
        for _overload in ("Tensor", "Scalar"):
            _RULES[getattr(_packet, _overload)] = partial(_binary, _operation)
