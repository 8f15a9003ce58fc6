"""``attention.cpp`` as PyTorch operators, opaque to whoever notes operations."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reasonalloc.ops.interface import Runs
from reasonalloc.ops.native.build import library
from reasonalloc.ops.native.check import address, failure
from reasonalloc.ops.native.structs import FLOATS, Attend

_TWO = ctypes.c_int64 * 2
_operators = torch.library.Library("reasonalloc", "FRAGMENT")
_READ = (
    "Tensor query, Tensor{} keys, Tensor{} values, Tensor offsets, Tensor{} lengths, "
    "float scaling, float softcap, Tensor? sinks, "
)
_operators.define(
    f"ragged_decode({_READ.format('', '', '')} bool need_weights) -> (Tensor, Tensor)"
)
_operators.define(
    f"ragged_step({_READ.format('(a!)', '(b!)', '(c!)')} Tensor key, Tensor value, "
    "Tensor(d!) positions, Tensor seen, Tensor(e!)? state, Tensor(f!)? ring, bool need_weights) "
    "-> (Tensor, Tensor)"
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
    query: Tensor,
    slab: Runs,
    scaling: float,
    softcap: float | None,
    need_weights: bool,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See ``Backend.decode``; softmax and sums are in float32, an empty run gives zeros."""
    out, received = torch.ops.reasonalloc.ragged_decode(
        *(query, slab.keys, slab.values, slab.offsets, slab.lengths),
        *(scaling, softcap or 0.0, as_floats(sinks), need_weights),
    )
    return out, received if need_weights else None


def step(
    query: Tensor,
    slab: Runs,
    new: NewToken,
    scaling: float,
    softcap: float | None,
    need_weights: bool,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Store a token in every run of a ragged slab, note its query, and attend as ``decode``."""
    out, received = torch.ops.reasonalloc.ragged_step(
        *(query, slab.keys, slab.values, slab.offsets, slab.lengths),
        *(scaling, softcap or 0.0, as_floats(sinks), *new, need_weights),
    )
    return out, received if need_weights else None


def as_floats(sinks: Tensor | None) -> Tensor | None:
    """The same in float32 and contiguous."""
    return None if sinks is None else sinks.float().contiguous()


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
    sinks: Tensor | None = None,
) -> Attend:
    """Arguments of the operators as those of the loop.

    Args:
        query: [batch, query_heads, 1, head_dim]; like the new key and value with contiguous rows.
        keys, values, offsets, lengths: of the slab, contiguous.
        scaling, softcap: of the logits; 0: no soft-capping.
        new: what is stored first, or None.
        out: [batch, query_heads, 1, value_dim]; received: [batch, slots] float32 or None.
        sinks: [query_heads] float32, contiguous, or None.

    Raises:
        RuntimeError: one of them is not so.
    """
    arguments = Attend()
    arguments.offsets = address("offsets", offsets, torch.int64, (query.shape[0], lengths.shape[1]))
    fill(arguments, query, keys, values, lengths, scaling, softcap, new, out, received, sinks)
    return arguments


def fill(
    arguments: Attend,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scaling: float,
    softcap: float,
    new: NewToken | None,
    out: Tensor,
    received: Tensor | None,
    sinks: Tensor | None = None,
) -> None:
    """Fill in all but ``offsets``, see ``arguments_of``; ``before`` is there already.

    Raises:
        RuntimeError: a tensor is not what C++ takes it for.
    """
    batch, heads, _, width = query.shape
    slots, value_width, kv_heads = keys.shape[1], values.shape[2], lengths.shape[1]
    if heads % kv_heads:
        raise RuntimeError(f"{heads} query heads cannot be divided among {kv_heads} KV heads")
    arguments.query = address("query", query, None, (batch, heads, 1, width), rows=True)
    arguments.query_kind = FLOATS[query.dtype]
    arguments.query_strides = _TWO(*query.stride()[:2])
    arguments.keys = address("keys", keys, None, (batch, slots, width))
    arguments.key_kind = FLOATS[keys.dtype]
    arguments.values = address("values", values, None, (batch, slots, value_width))
    arguments.value_kind = FLOATS[values.dtype]
    arguments.lengths = address("lengths", lengths, torch.int64, (batch, kv_heads))
    arguments.out = address("out", out, values.dtype, (batch, heads, 1, value_width))
    arguments.batch, arguments.kv_heads, arguments.group = batch, kv_heads, heads // kv_heads
    arguments.slots, arguments.width, arguments.value_width = slots, width, value_width
    arguments.scaling, arguments.softcap = scaling, softcap
    if sinks is not None:
        arguments.sinks = address("sinks", sinks, torch.float32, (heads,))
    if received is not None:
        of_received = batch, arguments.before + slots
        arguments.received = address("received", received, torch.float32, of_received)
    if new is not None:
        _add_token(arguments, new, query, keys, values)


def _add_token(
    arguments: Attend, new: NewToken, query: Tensor, keys: Tensor, values: Tensor
) -> None:
    """What is stored first; the other arguments are there already."""
    batch, slots, width = keys.shape
    token, noted = (batch, arguments.kv_heads, 1), (batch, arguments.before + slots)
    arguments.key = address("key", new.key, keys.dtype, (*token, width), rows=True)
    arguments.key_strides = _TWO(*new.key.stride()[:2])
    of_value = (*token, values.shape[2])
    arguments.value = address("value", new.value, values.dtype, of_value, rows=True)
    arguments.value_strides = _TWO(*new.value.stride()[:2])
    arguments.positions = address("positions", new.positions, torch.int32, noted)
    arguments.seen = address("seen", new.seen, torch.int64, (batch,))
    if new.state is not None:
        arguments.channels = new.state.shape[-1]
        of_state = (*noted, arguments.channels)
        arguments.state = address("state", new.state, torch.float32, of_state)
    if new.ring is not None:
        arguments.window = new.ring.shape[1]
        of_ring = batch, arguments.window, query.shape[1], width
        arguments.ring = address("ring", new.ring, query.dtype, of_ring)


def _results(query: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Empty ones of either operator, whose last argument is ``need_weights``."""
    received = keys.new_empty(keys.shape[:2] if rest[-1] else (0,), dtype=torch.float32)
    return values.new_empty(*query.shape[:3], values.shape[2]), received


def _ragged(query: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Either operator; what is stored in between is a ``NewToken``."""
    out, received = _results(query, keys, values, *rest)
    offsets, lengths, scaling, softcap, sinks, *token, need_weights = rest
    query, offsets, new = with_rows(query), offsets.contiguous(), None
    if token:
        new = NewToken(with_rows(token[0]), with_rows(token[1]), *token[2:])
    weights = received if need_weights else None
    arguments = arguments_of(
        query, keys, values, offsets, lengths, scaling, softcap, new, out, weights, sinks
    )
    code = library().reasonalloc_attend(ctypes.byref(arguments), torch.get_num_threads())
    if code:
        raise failure(code)
    return out, received


def with_rows(tensor: Tensor) -> Tensor:
    """The same with a contiguous last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


for _name in ("ragged_decode", "ragged_step"):
    _operators.impl(_name, _ragged, "CPU")
    torch.library.register_fake(f"reasonalloc::{_name}", _results, lib=_operators)
