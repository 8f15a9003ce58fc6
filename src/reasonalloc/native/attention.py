"""``attention.cpp`` as PyTorch operators, opaque to whoever notes operations."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reasonalloc.attention.interface import SlabView
from reasonalloc.native.build import KINDS, library

_I, _P, _TWO = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64 * 2
_operators = torch.library.Library("reasonalloc", "FRAGMENT")
_READ = (
    "Tensor query, Tensor{} keys, Tensor{} values, Tensor offsets, Tensor{} lengths, "
    "float scaling, float softcap, "
)
_operators.define(
    f"ragged_decode({_READ.format('', '', '')} bool need_weights) -> (Tensor, Tensor)"
)
_operators.define(
    f"ragged_step({_READ.format('(a!)', '(b!)', '(c!)')} Tensor key, Tensor value, "
    "Tensor(d!) positions, Tensor seen, Tensor(e!)? state, Tensor(f!)? ring, bool need_weights) "
    "-> (Tensor, Tensor)"
)


class Attend(ctypes.Structure):
    """The arguments of one call; holds addresses alone, their tensors must be kept."""

    _fields_ = (
        ("query", _P),
        ("query_kind", _I),
        ("query_strides", _TWO),
        ("key", _P),
        ("key_strides", _TWO),
        ("value", _P),
        ("value_strides", _TWO),
        ("keys", _P),
        ("key_kind", _I),
        ("values", _P),
        ("value_kind", _I),
        ("positions", _P),
        ("offsets", _P),
        ("lengths", _P),
        ("seen", _P),
        ("state", _P),
        ("channels", _I),
        ("ring", _P),
        ("window", _I),
        ("out", _P),
        ("received", _P),
        *((name, _I) for name in ("batch", "kv_heads", "group", "slots", "width", "value_width")),
        ("scaling", ctypes.c_double),
        ("softcap", ctypes.c_double),
    )


class NewToken(NamedTuple):
    """What is stored before a query attends.

    Attributes:
        key, value: [batch, kv_heads, 1, dim] in the types of the slab.
        positions, state: of the slab, contiguous.
        seen: [batch] int64, position of the token.
        ring: [batch, window, query_heads, head_dim] of the query's type, or None.
    """

    key: Tensor
    value: Tensor
    positions: Tensor
    seen: Tensor
    state: Tensor | None
    ring: Tensor | None


def decode(
    query: Tensor, slab: SlabView, scaling: float, softcap: float | None, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """See ``Backend.decode``; softmax and sums are in float32, an empty run gives zeros."""
    out, received = torch.ops.reasonalloc.ragged_decode(
        *(query, slab.keys, slab.values, slab.offsets, slab.lengths),
        *(scaling, softcap or 0.0, need_weights),
    )
    return out, received if need_weights else None


def step(
    query: Tensor,
    slab: SlabView,
    new: NewToken,
    scaling: float,
    softcap: float | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Store a token in every run of a ragged slab, note its query, and attend as ``decode``."""
    out, received = torch.ops.reasonalloc.ragged_step(
        *(query, slab.keys, slab.values, slab.offsets, slab.lengths),
        *(scaling, softcap or 0.0, *new, need_weights),
    )
    return out, received if need_weights else None


def arguments_of(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    scaling: float,
    softcap: float,
    new: NewToken | None,
    out: Tensor,
    received: Tensor | None,
) -> Attend:
    """Arguments of the operators as those of the loop.

    Args:
        query: [batch, query_heads, 1, head_dim]; like the new key and value with contiguous rows.
        keys, values, offsets, lengths: of the slab, contiguous.
        scaling, softcap: of the logits; 0: no soft-capping.
        new: what is stored first, or None.
        out: [batch, query_heads, 1, value_dim]; received: [batch, slots] float32 or None.
    """
    kv_heads = lengths.shape[1]
    arguments = Attend(
        query=query.data_ptr(),
        query_kind=KINDS[query.dtype],
        query_strides=_TWO(*query.stride()[:2]),
        keys=keys.data_ptr(),
        key_kind=KINDS[keys.dtype],
        values=values.data_ptr(),
        value_kind=KINDS[values.dtype],
        offsets=offsets.data_ptr(),
        lengths=lengths.data_ptr(),
        out=out.data_ptr(),
        received=None if received is None else received.data_ptr(),
        batch=query.shape[0],
        kv_heads=kv_heads,
        group=query.shape[1] // kv_heads,
        slots=keys.shape[1],
        width=query.shape[3],
        value_width=values.shape[2],
        scaling=scaling,
        softcap=softcap,
    )
    if new is None:
        return arguments
    arguments.key, arguments.key_strides = new.key.data_ptr(), _TWO(*new.key.stride()[:2])
    arguments.value, arguments.value_strides = new.value.data_ptr(), _TWO(*new.value.stride()[:2])
    arguments.positions, arguments.seen = new.positions.data_ptr(), new.seen.data_ptr()
    if new.state is not None:
        arguments.state, arguments.channels = new.state.data_ptr(), new.state.shape[-1]
    if new.ring is not None:
        arguments.ring, arguments.window = new.ring.data_ptr(), new.ring.shape[1]
    return arguments


def failure(code: int) -> Exception:
    """What a code of ``attention.cpp`` says."""
    if code == 1:
        return MemoryError("attention='cpp': not enough memory for the pieces of a step")
    if code == 2:
        return RuntimeError("a run is full: compress before appending")
    return IndexError("a token id is not in the model's vocabulary")


def _results(query: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Empty ones of either operator, whose last argument is ``need_weights``."""
    received = keys.new_empty(keys.shape[:2] if rest[-1] else (0,), dtype=torch.float32)
    return values.new_empty(*query.shape[:3], values.shape[2]), received


def _ragged(query: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Either operator; what is stored in between is a ``NewToken``."""
    out, received = _results(query, keys, values, *rest)
    offsets, lengths, scaling, softcap, *token, need_weights = rest
    query, offsets, new = _with_rows(query), offsets.contiguous(), None
    if token:
        new = NewToken(_with_rows(token[0]), _with_rows(token[1]), *token[2:])
    weights = received if need_weights else None
    arguments = arguments_of(
        query, keys, values, offsets, lengths, scaling, softcap, new, out, weights
    )
    code = library().reasonalloc_attend(ctypes.byref(arguments), torch.get_num_threads())
    if code:
        raise failure(code)
    return out, received


def _with_rows(tensor: Tensor) -> Tensor:
    """The same with a contiguous last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


for _name in ("ragged_decode", "ragged_step"):
    _operators.impl(_name, _ragged, "CPU")
    torch.library.register_fake(f"reasonalloc::{_name}", _results, lib=_operators)
