"""``attention.cpp`` as PyTorch operators, opaque to whoever notes operations."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from reasonalloc.attention.interface import SlabView
from reasonalloc.cache import Slab
from reasonalloc.native.build import kind, library

_I, _P, _TWO = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64 * 2
_operators = torch.library.Library("reasonalloc", "FRAGMENT")
_operators.define(
    "ragged_decode(Tensor query, Tensor keys, Tensor values, Tensor offsets, Tensor lengths, "
    "float scaling, float softcap, bool need_weights) -> (Tensor, Tensor)"
)
_operators.define(
    "ragged_step(Tensor query, Tensor key, Tensor value, Tensor(a!) keys, Tensor(b!) values, "
    "Tensor(c!) positions, Tensor offsets, Tensor(d!) lengths, Tensor seen, Tensor(e!)? state, "
    "Tensor(f!)? ring, float scaling, float softcap, bool need_weights) -> (Tensor, Tensor)"
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


def decode(
    query: Tensor, slab: SlabView, scaling: float, softcap: float | None, need_weights: bool
) -> tuple[Tensor, Tensor | None]:
    """See ``Backend.decode``; softmax and sums are in float32, an empty run gives zeros."""
    out, received = torch.ops.reasonalloc.ragged_decode(
        query,
        slab.keys,
        slab.values,
        slab.offsets,
        slab.lengths,
        scaling,
        softcap or 0.0,
        need_weights,
    )
    return out, received if need_weights else None


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slab: Slab,
    seen: Tensor,
    ring: Tensor | None,
    scaling: float,
    softcap: float | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Store a new token in every run, note its query, and attend as ``decode`` does.

    Args:
        query: [batch, query_heads, 1, head_dim]; key, value: [batch, kv_heads, 1, dim] in the
            types of the slab.
        slab: its runs are ragged.
        seen: [batch] int64, position of the new token.
        ring: [batch, window, query_heads, head_dim] of the query's type, or None.
    """
    out, received = torch.ops.reasonalloc.ragged_step(
        *(query, key, value, slab.keys, slab.values, slab.positions, slab.offsets, slab.lengths),
        *(seen, slab.state, ring, scaling, softcap or 0.0, need_weights),
    )
    return out, received if need_weights else None


def step_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    seen: Tensor,
    state: Tensor | None,
    ring: Tensor | None,
    scaling: float,
    softcap: float,
    out: Tensor,
    received: Tensor | None,
) -> Attend:
    """Arguments of the operator ``ragged_step`` as those of the loop.

    Args:
        query: [batch, query_heads, 1, head_dim]; key, value: [batch, kv_heads, 1, dim] of the new
            token, in the types of the slab; rows are contiguous.
        keys, values, positions, offsets, lengths, state: of the slab, contiguous.
        seen: [batch] int64, position of the new token.
        ring: [batch, window, query_heads, head_dim] of the query's type, or None.
        out: [batch, query_heads, 1, value_dim]; received: [batch, slots] float32 or None.
    """
    arguments = _arguments(query, keys, values, offsets, lengths, scaling, softcap, out, received)
    arguments.key, arguments.key_strides = key.data_ptr(), _TWO(*key.stride()[:2])
    arguments.value, arguments.value_strides = value.data_ptr(), _TWO(*value.stride()[:2])
    arguments.positions, arguments.seen = positions.data_ptr(), seen.data_ptr()
    if state is not None:
        arguments.state, arguments.channels = state.data_ptr(), state.shape[-1]
    if ring is not None:
        arguments.ring, arguments.window = ring.data_ptr(), ring.shape[1]
    return arguments


def _arguments(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    scaling: float,
    softcap: float,
    out: Tensor,
    received: Tensor | None,
) -> Attend:
    kv_heads = lengths.shape[1]
    return Attend(
        query=query.data_ptr(),
        query_kind=kind(query.dtype),
        query_strides=_TWO(*query.stride()[:2]),
        keys=keys.data_ptr(),
        key_kind=kind(keys.dtype),
        values=values.data_ptr(),
        value_kind=kind(values.dtype),
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


def results(query: Tensor, keys: Tensor, values: Tensor, need_weights: bool) -> tuple[Any, Any]:
    """Empty output and weights received (without elements if they are not needed)."""
    received = keys.new_empty(keys.shape[:2] if need_weights else (0,), dtype=torch.float32)
    return values.new_empty(*query.shape[:3], values.shape[2]), received


def failure(code: int) -> Exception:
    """What a code of ``attention.cpp`` says."""
    if code == 1:
        return MemoryError("attention='cpp': not enough memory for the pieces of a step")
    if code == 2:
        return RuntimeError("a run is full: compress before appending")
    return IndexError("a token id is not in the model's vocabulary")


def _run(arguments: Attend) -> None:
    code = library().reasonalloc_attend(ctypes.byref(arguments), torch.get_num_threads())
    if code:
        raise failure(code)


def _ragged_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    scaling: float,
    softcap: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes as of ``Backend.decode``; keys, values and lengths are contiguous."""
    out, received = results(query, keys, values, need_weights)
    query, offsets = with_rows(query), offsets.contiguous()
    weights = received if need_weights else None
    _run(_arguments(query, keys, values, offsets, lengths, scaling, softcap, out, weights))
    return out, received


def _ragged_step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    seen: Tensor,
    state: Tensor | None,
    ring: Tensor | None,
    scaling: float,
    softcap: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Store a token, note its query, attend; see ``step_arguments``."""
    out, received = results(query, keys, values, need_weights)
    query, key, value = with_rows(query), with_rows(key), with_rows(value)
    _run(
        step_arguments(
            *(query, key, value, keys, values, positions, offsets, lengths, seen, state, ring),
            *(scaling, softcap, out, received if need_weights else None),
        )
    )
    return out, received


def with_rows(tensor: Tensor) -> Tensor:
    """The same with a contiguous last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _fake_decode(query: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Any, Any]:
    return results(query, keys, values, rest[-1])


def _fake_step(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, *rest: Any
) -> tuple[Any, Any]:
    return results(query, keys, values, rest[-1])


_operators.impl("ragged_decode", _ragged_decode, "CPU")
_operators.impl("ragged_step", _ragged_step, "CPU")
torch.library.register_fake("reasonalloc::ragged_decode", _fake_decode, lib=_operators)
torch.library.register_fake("reasonalloc::ragged_step", _fake_step, lib=_operators)
