"""``coded.cpp`` as PyTorch operators, opaque to whoever notes operations."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reasonalloc.ops.codes import KINDS, VALUE_KINDS, Field, RowFormat
from reasonalloc.ops.interface import CodedTokens
from reasonalloc.ops.native.attention import NewToken, as_floats, fill, with_rows
from reasonalloc.ops.native.build import library
from reasonalloc.ops.native.check import address, failure
from reasonalloc.ops.native.structs import AttendCoded, Format

_operators = torch.library.Library("reasonalloc", "FRAGMENT")
_READ = (
    "Tensor query, Tensor pool, Tensor starts, Tensor offsets, Tensor lengths, "
    "Tensor{} tail_keys, Tensor{} tail_values, Tensor{} tail_lengths, int[] kinds, "
    "int coded_slots, float scaling, float softcap, Tensor? sinks, "
)
_operators.define(f"coded_decode({_READ.format('', '', '')} bool need_weights) -> (Tensor, Tensor)")
_operators.define(
    f"coded_step({_READ.format('(a!)', '(b!)', '(c!)')} Tensor key, Tensor value, "
    "Tensor(d!) positions, Tensor seen, Tensor(e!)? state, Tensor(f!)? ring, bool need_weights) "
    "-> (Tensor, Tensor)"
)


class CodedInput(NamedTuple):
    """What is attended to, in the order of the operators' arguments.

    Attributes:
        pool, starts, offsets, lengths: the runs, see ``CodedTokens``.
        tail_keys, tail_values, tail_lengths: the tails.
        kinds: numbers of the formats in ``KINDS``: of the keys and of the values of each head.
        coded_slots: slots of the runs.
    """

    pool: Tensor
    starts: Tensor
    offsets: Tensor
    lengths: Tensor
    tail_keys: Tensor
    tail_values: Tensor
    tail_lengths: Tensor
    kinds: Sequence[int]
    coded_slots: int


def decode(
    query: Tensor,
    slab: CodedTokens,
    scaling: float,
    softcap: float | None,
    need_weights: bool,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See ``Backend.decode_coded``; softmax and sums are in float32, a head of nothing gives zeros.

    Raises:
        RuntimeError: a tensor is not what C++ takes it for, or a run ends outside of its storage.
    """
    out, received = torch.ops.reasonalloc.coded_decode(
        query, *_input_of(slab), scaling, softcap or 0.0, as_floats(sinks), need_weights
    )
    return out, received if need_weights else None


def step(
    query: Tensor,
    slab: CodedTokens,
    new: NewToken,
    scaling: float,
    softcap: float | None,
    need_weights: bool,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Store a token at the end of every tail, note its query, and attend as ``decode``."""
    out, received = torch.ops.reasonalloc.coded_step(
        query, *_input_of(slab), scaling, softcap or 0.0, as_floats(sinks), *new, need_weights
    )
    return out, received if need_weights else None


def _input_of(slab: CodedTokens) -> CodedInput:
    keys, values = slab.tail_keys, slab.tail_values
    return CodedInput(
        slab.pool,
        slab.starts,
        slab.offsets,
        slab.lengths,
        keys,
        values,
        slab.tail_lengths,
        _kinds_of(slab.formats, keys.shape[3], values.shape[3], keys.dtype, values.dtype),
        slab.coded_slots,
    )


@lru_cache(maxsize=256)
def _kinds_of(
    formats: tuple[RowFormat, ...],
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    value_dtype: torch.dtype,
) -> tuple[int, ...]:
    """``CodedInput.kinds``; raises RuntimeError for formats of other vectors than the tails'."""
    for head, given in enumerate(formats):
        own = RowFormat(
            Field(given.key.kind, dim, dtype), Field(given.value.kind, value_dim, value_dtype)
        )
        if Format.of(given).numbers() != Format.of(own).numbers():
            raise RuntimeError(
                f"formats[{head}] is of keys and values of other widths or types than those of the "
                f"tails, {dim} of {dtype} and {value_dim} of {value_dtype}: {given}"
            )
    return tuple(KINDS[kind] for f in formats for kind in (f.key.kind, f.value.kind))


@lru_cache(maxsize=256)
def _formats_of(
    kinds: tuple[int, ...],
    dim: int,
    value_dim: int,
    dtype: torch.dtype,
    value_dtype: torch.dtype,
) -> ctypes.Array[Format]:
    """The formats of heads as C++ reads them; raises RuntimeError if there are no such."""
    names = {number: name for name, number in KINDS.items()}
    pairs = list(zip(kinds[::2], kinds[1::2], strict=True))
    array = (Format * len(pairs))()
    for head, (key, value) in enumerate(pairs):
        if names.get(key) is None or names.get(value) not in VALUE_KINDS:
            raise RuntimeError(f"kinds of head {head} are {key} and {value}: there are no such")
        fields = Field(names[key], dim, dtype), Field(names[value], value_dim, value_dtype)
        if any(f.kind in ("int4", "int4h") and f.dim % 2 for f in fields):
            raise RuntimeError(f"head {head} has vectors of odd widths, which int4 cannot hold")
        array[head] = Format.of(RowFormat(*fields))
    return array


def arguments_of(
    query: Tensor,
    read: CodedInput,
    scaling: float,
    softcap: float,
    new: NewToken | None,
    out: Tensor,
    received: Tensor | None,
    sinks: Tensor | None = None,
) -> AttendCoded:
    """Arguments of the operators as those of the loop.

    Args:
        query: [batch, query_heads, 1, head_dim]; like the new key and value with contiguous rows.
        read: its tensors contiguous.
        scaling, softcap: of the logits; 0: no soft-capping.
        new: what is stored first, or None; positions and state of all slots.
        out: [batch, query_heads, 1, value_dim].
        received: [batch, coded_slots + kv_heads * room] float32 or None.
        sinks: [query_heads] float32, contiguous, or None.

    Raises:
        RuntimeError: one of them is not so.
    """
    keys, values = read.tail_keys, read.tail_values
    (batch, _, _, dim), (_, kv_heads, room, value_dim) = query.shape, values.shape
    slots = kv_heads * room
    if len(read.kinds) != 2 * kv_heads:
        raise RuntimeError(f"kinds are {len(read.kinds)} numbers, not two for each of {kv_heads}")
    if read.coded_slots < 0:
        raise RuntimeError(f"coded_slots are {read.coded_slots}, but cannot be fewer than none")
    address("tail_keys", keys, None, (batch, kv_heads, room, dim))
    address("tail_values", values, None, (batch, kv_heads, room, value_dim))
    address("tail_lengths", read.tail_lengths, torch.int64, (batch, kv_heads))
    formats = _formats_of(tuple(read.kinds), dim, value_dim, keys.dtype, values.dtype)
    tables = {
        name: address(name, tensor, torch.int64, (batch, kv_heads))
        for name, tensor in (
            ("starts", read.starts),
            ("offsets", read.offsets),
            ("lengths", read.lengths),
        )
    }
    arguments = AttendCoded(
        room=room,
        before=read.coded_slots,
        pool=address("pool", read.pool, torch.uint8, (batch, *read.pool.shape[1:2])),
        pool_bytes=read.pool.shape[1],
        formats=ctypes.addressof(formats),
        starts=tables["starts"],
        run_offsets=tables["offsets"],
        run_lengths=tables["lengths"],
    )
    arguments.kept = formats  # as long as its address
    fill(
        arguments,
        query,
        keys.view(batch, slots, dim),
        values.view(batch, slots, value_dim),
        read.tail_lengths,
        scaling,
        softcap,
        new,
        out,
        received,
        sinks,
    )
    return arguments


def _results(
    query: Tensor, pool: Tensor, starts: Tensor, offsets: Tensor, lengths: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Empty ones of either operator, whose last argument is ``need_weights``."""
    keys, values, _, _, coded_slots, *others = rest
    batch, kv_heads, room = keys.shape[:3]
    slots = coded_slots + kv_heads * room
    received = keys.new_empty((batch, slots) if others[-1] else (0,), dtype=torch.float32)
    return values.new_empty(*query.shape[:3], values.shape[3]), received


def _coded(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Either operator; what is stored in between is a ``NewToken``."""
    out, received = _results(query, *rest)
    query = with_rows(query)
    count = len(CodedInput._fields)
    read = CodedInput(*rest[:count])
    scaling, softcap, sinks, *token, need_weights = rest[count:]
    tables = {name: getattr(read, name).contiguous() for name in ("starts", "offsets", "lengths")}
    new = NewToken(with_rows(token[0]), with_rows(token[1]), *token[2:]) if token else None
    weights = received if need_weights else None
    read, how = read._replace(**tables), (scaling, softcap)
    arguments = arguments_of(query, read, *how, new, out, weights, sinks)
    code = library().reasonalloc_attend_coded(ctypes.byref(arguments), torch.get_num_threads())
    if code:
        raise failure(code)
    return out, received


for _name in ("coded_decode", "coded_step"):
    _operators.impl(_name, _coded, "CPU")
    torch.library.register_fake(f"reasonalloc::{_name}", _results, lib=_operators)
