"""PyTorch operations of a noted decode step as instructions of ``program.py``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reasonalloc.native import build
from reasonalloc.native.attention import Attend, NewToken, arguments_of
from reasonalloc.native.program import KINDS, Draft, Operation, Share, collapsed, storage_of

_aten = torch.ops.aten
#: Rows up to which products with weights are our own (measured on AVX2: at 64 they still win).
MOST_ROWS = 32
_MOST_ROWS_16 = 4  # of 16-bit weights, where the processor multiplies them itself
_FLOATING = build.KINDS
_ROWS_FROM = 2048  # elements from which threads divide an operation by sequences
_BLOCKS_FROM = 65536  # and by blocks


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


def elementwise(
    operation: Operation,
    out: Tensor,
    a: Tensor,
    b: Tensor | None = None,
    number: float = 0.0,
    factor: float = 1.0,
) -> list[Draft] | None:
    """``out = operation(a, b)`` with broadcasting; all have kinds that the loops know."""
    tensors = [out, a] if b is None else [out, a, b]
    if out.dtype not in _FLOATING or not all(_known(t.dtype) for t in tensors):
        return None
    integers = [t for t in tensors[1:] if t.dim() > 0 and t.dtype not in _FLOATING]
    if b is not None and integers and out.dtype is not torch.float32:
        return None  # PyTorch rounds them to 16 bits first
    if out.numel() == 0 or not all(_apart_or_same(out, t) for t in tensors[1:]):
        return None
    loops = _loops(out.shape, [t.expand(out.shape).stride() for t in tensors], 4, out.numel())
    if loops is None:
        return None
    sizes, strides, share = loops
    operands = list(zip(tensors, strides, strict=True))
    draft = Draft(operation, sizes, operands[0], operands[1], number=number, factor=factor)
    draft.share = share
    if b is not None:
        draft.b = operands[2]
    return [draft]


def _loops(
    shape: Sequence[int], strides: Sequence[Sequence[int]], most: int, elements: int
) -> tuple[Any, list[Any], Share] | None:
    """Sizes of ``most`` loops, each tensor's strides, and how threads divide them."""
    if len(shape) > 1 and shape[0] > 1 and elements >= _ROWS_FROM:
        found = collapsed(shape[1:], [s[1:] for s in strides], most - 1)
        if found is not None:
            sizes, steps = found
            first = [(s[0], *t) for s, t in zip(strides, steps, strict=True)]
            return (shape[0], *sizes), first, Share.ROWS
    found = collapsed(shape, strides, most)
    if found is None:
        return None
    sizes, steps = found
    share = Share.BLOCKS if elements >= _BLOCKS_FROM else Share.NONE
    return tuple(sizes), [tuple(t) for t in steps], share


def _known(dtype: torch.dtype) -> bool:
    """Whether the loops, as this compiler made them, know a type."""
    kind = KINDS.get(dtype, -1)
    return kind > 2 or (kind >= 0 and bool(build.library().reasonalloc_knows(kind)))


def _apart_or_same(out: Tensor, other: Tensor) -> bool:
    """Whether an operation may write ``out`` block by block while it reads ``other``."""
    if storage_of(out) != storage_of(other):
        return True
    same = (out.shape, out.stride(), out.storage_offset()) == (
        other.shape,
        other.stride(),
        other.storage_offset(),
    )
    return same and out.dtype == other.dtype


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
        return [Draft(Operation.COUNT, sizes, (out, _LINE), (a, _LINE), number=number)]
    return elementwise(operation, out, a, number=float(b), factor=float(alpha))


_LINE = (0, 0, 0, 1)


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
    if not dims or x.dim() == 0 or x.dtype not in _FLOATING or out.dtype not in _FLOATING:
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
    loops = _loops(x.shape[:-1], strides, 3, x.numel())
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
        found = elementwise(Operation.COPY, own, part)
        if found is None:
            return None
        drafts += found
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
    return [Draft(Operation.EMBED, sizes, (out, _LINE), (weight, _LINE), (places, _LINE))]


def _product(call: Call) -> list[Draft] | None:
    bias, (x, w) = (None, call.args) if call.func is _aten.mm.default else _with_bias(call)
    out = call.result
    rows, width = x.shape
    if not (
        0 < rows <= most_rows(w.dtype)
        and width > 0
        and w.stride(0) == 1
        and w.stride(1) >= width
        and all(t.dtype in _FLOATING and _known(t.dtype) for t in (x, w, out))
        and out.stride(1) == 1
        and call.kwargs in ({}, {"beta": 1, "alpha": 1})
    ):
        return None
    drafts: list[Draft] = []
    x = _as_float_rows(x, drafts)
    step = x.stride(0) if rows > 1 else 0
    operand = None
    if bias is not None:
        if bias.dim() != 1 or bias.dtype not in _FLOATING or len(bias) != w.shape[1]:
            return None
        operand = (_as_float_rows(bias[None], drafts)[0], _LINE)
    drafts.append(
        Draft(
            Operation.PRODUCT,
            (rows, w.shape[1], width, 0),
            (out, (out.stride(0), 0, 0, 0)),
            (x, (step, 0, 0, 0)),
            (w, (w.stride(1), 0, 0, 0)),
            operand,
            share=Share.BLOCKS,
        )
    )
    return drafts


@functools.cache
def most_rows(dtype: torch.dtype) -> int:
    """Rows up to which products with weights of this type are our own."""
    own_units = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return _MOST_ROWS_16 if own_units and dtype is not torch.float32 else MOST_ROWS


def _with_bias(call: Call) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    bias, x, w = call.args
    return bias, (x, w)


def _as_float_rows(x: Tensor, drafts: list[Draft]) -> Tensor:
    """The rows as contiguous floats, by a copy if they are not."""
    if x.dtype is torch.float32 and (x.stride(1) == 1 or x.shape[1] == 1):
        return x
    copy = torch.empty(x.shape, dtype=torch.float32, device="cpu")
    for draft in elementwise(Operation.COPY, copy, x) or []:
        draft.temporary.add(storage_of(copy))
        drafts.append(draft)
    return copy


def _attend(call: Call) -> list[Draft] | None:
    query, keys, values, offsets, lengths, scaling, softcap, *token, need_weights = call.args
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
        )

    changed = [keys, values, lengths, new.positions, new.state, new.ring]
    writes = [out, *(t for t in changed if t is not None), *([received] if need_weights else [])]
    return [
        Draft(
            Operation.ATTEND,
            (0, 0, 0, 0),
            share=Share.BLOCKS,
            reads=[*rows, offsets, new.seen],
            writes=writes,
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
