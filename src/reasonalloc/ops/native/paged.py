"""``paged.cpp``: attention over pages of one KV head each, for engines that keep pages."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.ops.codes import KINDS, VALUE_KINDS, Field, RowFormat
from reasonalloc.ops.native import structs
from reasonalloc.ops.native.build import library
from reasonalloc.ops.native.check import address, failure
from reasonalloc.ops.native.structs import FLOATS, AttendPaged, Format, PagePool, Received
from reasonalloc.ops.page_rows import PageRows

_LEAST = 16  # tokens of a page: a vector of the widest registers
_TWO = ctypes.c_int64 * 2


@dataclass(frozen=True)
class Layout:
    """Where the tokens of runs lie.

    Attributes:
        memory: [pages, 2, size, head_dim], keys and values; rows of ``memory[:, 0]`` are keys, or
            it holds them as [head_dim, size].
        turned: the latter.
    """

    memory: Tensor
    turned: bool

    @classmethod
    def of(cls, memory: Tensor, keys: Tensor, values: Tensor) -> Layout | None:
        """The layout of a pool; None if the loops cannot read it.

        Args:
            memory: [pages, 2, size, head_dim].
            keys, values: [pages, size, head_dim], views of it.
        """
        _, parts, size, width = memory.shape
        page = 2 * size * width
        plain, turned = (page, width, 1), (page, 1, size)
        readable = (
            parts == 2
            and memory.is_cpu
            and memory.is_contiguous()
            and memory.dtype in FLOATS
            and size >= _LEAST
            and size & (size - 1) == 0
            and values.stride() == plain
            and keys.stride() in (plain, turned)
        )
        return cls(memory, keys.stride() != plain) if readable else None

    def pool(self) -> PagePool:
        """The same as C++ reads it.

        Raises:
            RuntimeError: the memory is not what C++ takes it for.
        """
        pages, _, size, width = self.memory.shape
        kind = FLOATS[self.memory.dtype]
        at = address("memory", self.memory, None, (pages, 2, size, width))
        return PagePool(at, kind, pages, size, width, int(self.turned))


@dataclass(frozen=True)
class CodedPages:
    """How coded tokens lie in the pages that the runs of a model begin with.

    Attributes:
        rows: formats.
        of: [layers, kv_heads] int32, the number in ``rows`` of each head.
    """

    rows: tuple[PageRows, ...]
    of: Tensor


@dataclass(frozen=True)
class CodedRuns:
    """The coded tokens that some runs begin with.

    Attributes:
        rows: formats.
        of: [runs] int32, the number in ``rows`` of each run.
        lengths: [runs] int32, coded tokens of each.
        begins: [runs] int32, the place where its other tokens begin: its coded pages * size.
        tokens: most tokens of a run, coded and others.
    """

    rows: tuple[PageRows, ...]
    of: Tensor
    lengths: Tensor
    begins: Tensor
    tokens: int


def _formats_of(layout: Layout, rows: Sequence[PageRows]) -> ctypes.Array[Format]:
    """Formats of rows in pages as C++ reads them.

    Raises:
        RuntimeError: they are of other pages or vectors than the pool's, or there are no such.
    """
    _, _, size, dim = layout.memory.shape
    dtype = layout.memory.dtype
    page_bytes = 2 * size * dim * dtype.itemsize
    formats = (Format * len(rows))()
    for number, row in enumerate(rows):
        key, value = row.form.key, row.form.value
        own = Field(key.kind, dim, dtype), Field(value.kind, dim, dtype)
        packed = any("int4" in field.kind for field in own)
        if (
            key.kind not in KINDS
            or value.kind not in VALUE_KINDS
            or (packed and dim % 2)
            or row.page_bytes != page_bytes
            or Format.of(row.form).numbers() != Format.of(RowFormat(*own)).numbers()
            or row.width < row.form.width
            or row.per_page < 1
        ):
            raise RuntimeError(
                f"rows[{number}] cannot lie in pages of {page_bytes} bytes, of vectors of {dim} "
                f"numbers of {dtype}: {row}"
            )
        formats[number] = Format.of(row.form, row.width)
    return formats


class PagedLoop:
    """Stores one token per request, notes queries and attends, for all layers of steps.

    Args:
        layout: of the pool.
        group: query heads per KV head.
        kv_heads: of a layer.
        scaling, softcap: of the logits; 0: no soft-capping.
        coded: of the pages that runs may begin with; None: no token is coded.

    Raises:
        RuntimeError: coded tokens cannot lie so in pages of the pool.
    """

    def __init__(
        self,
        layout: Layout,
        group: int,
        kv_heads: int,
        scaling: float,
        softcap: float,
        coded: CodedPages | None = None,
    ) -> None:
        self._layout, self._group, self._heads = layout, group, kv_heads
        self._dtype, self._width = layout.memory.dtype, layout.memory.shape[-1]
        kind = FLOATS[self._dtype]
        self._arguments = AttendPaged(
            query_kind=kind,
            key_kind=kind,
            value_kind=kind,
            kv_heads=kv_heads,
            group=group,
            width=self._width,
            value_width=self._width,
            scaling=scaling,
            softcap=softcap,
            pool=layout.pool(),
        )
        self._coded = coded
        if coded is not None:
            self._formats = _formats_of(layout, coded.rows)  # as long as their address
            address("of", coded.of, torch.int32, (len(coded.of), kv_heads))
            self._arguments.coded.formats = ctypes.addressof(self._formats)
            self._arguments.coded.count = len(coded.rows)
        self._coded_starts: tuple[int, int, int] | None = None
        self._of_layer = (0, 0, 0)
        self.begun = 0  # steps
        self._kept: tuple[Tensor, ...] = ()  # as long as their addresses

    def begin(
        self,
        table: Tensor,
        lengths: Tensor,
        places: Tensor,
        noted: tuple[Tensor, Tensor, Tensor] | None,
        coded: Tensor | None = None,
        starts_of_tails: Tensor | None = None,
    ) -> None:
        """Take in what is the same for all layers of a step, or lies beside each other.

        Args:
            table: [layers, runs, columns] int32, pages of each run, those of coded tokens first.
            lengths: [layers, runs] int32, places of each run: those of its coded pages, then its
                other tokens, the new one included.
            places: [layers, runs] int64, where the new token goes: page * size + place.
            noted: queries to be remembered, [m] int64 each: of which requests, and the rows and
                places of the ring where they go; or None.
            coded: [layers, runs] int32, coded tokens of each run; None, as ``starts_of_tails``:
                there are none.
            starts_of_tails: [layers, runs] int32, the place where what is not coded begins: the
                pages of coded tokens * size.

        Raises:
            RuntimeError: one of them is not so.
        """
        layers, runs, columns = table.shape
        if runs % self._heads:
            raise RuntimeError(f"{runs} runs are not of requests with {self._heads} KV heads")
        own = self._arguments
        own.batch, own.columns = runs // self._heads, columns
        own.noted, self._of_layer = 0, (runs * columns * 4, runs * 4, runs * 8)
        self._starts = (
            address("table", table, torch.int32, (layers, runs, columns)),
            address("lengths", lengths, torch.int32, (layers, runs)),
            address("places", places, torch.int64, (layers, runs)),
        )
        self._layers = layers
        self._kept = (table, lengths, places)
        self._begin_coded(layers, runs, coded, starts_of_tails)
        self.begun += 1
        if noted is not None:
            own.noted = len(noted[0])
            own.noted_tokens, own.noted_rows, own.noted_places = (
                address(name, tensor, torch.int64, (own.noted,))
                for name, tensor in zip(("requests", "rows", "places"), noted, strict=True)
            )
            self._kept = (*self._kept, *noted)

    def _begin_coded(
        self, layers: int, runs: int, coded: Tensor | None, begins: Tensor | None
    ) -> None:
        """Take in the coded tokens of a step, if there are any; see ``begin``."""
        self._arguments.coded.lengths = self._coded_starts = None
        if coded is None and begins is None:
            return
        if coded is None or begins is None:
            raise RuntimeError("coded and starts_of_tails go together")
        if self._coded is None:
            raise RuntimeError("runs have coded tokens, but the loop was made for none")
        self._coded_starts = (
            address("of", self._coded.of, torch.int32, (layers, self._heads)),
            address("coded", coded, torch.int32, (layers, runs)),
            address("starts_of_tails", begins, torch.int32, (layers, runs)),
        )
        self._kept = (*self._kept, coded, begins)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        ring: Tensor | None,
        sinks: Tensor | None,
    ) -> None:
        """Do a layer of the step that was begun.

        Args:
            layer: which.
            query: [requests, query_heads, head_dim], like the key and the value of the pool's type
                and with contiguous rows.
            key, value: [requests, kv_heads, head_dim], of the new tokens.
            out: [requests, query_heads, head_dim], contiguous; filled in.
            ring: [rows, window, query_heads, head_dim] where queries are noted; needed if any are.
            sinks: [kv_heads, group] float32 learned sinks, or None.

        Raises:
            RuntimeError: one of them is not so, or a run lies outside of the pool.
        """
        own, dtype, width = self._arguments, self._dtype, self._width
        if not 0 <= layer < self._layers:
            raise RuntimeError(f"layer {layer} of {self._layers}")
        requests, heads = own.batch, self._heads * self._group
        own.query = address("query", query, dtype, (requests, heads, width), rows=True)
        own.key = address("key", key, dtype, (requests, self._heads, width), rows=True)
        own.value = address("value", value, dtype, (requests, self._heads, width), rows=True)
        own.out = address("out", out, dtype, (requests, heads, width))
        own.query_strides = _TWO(*query.stride()[:2])
        own.key_strides = _TWO(*key.stride()[:2])
        own.value_strides = _TWO(*value.stride()[:2])
        own.table, own.run_lengths, own.places = (
            start + layer * step for start, step in zip(self._starts, self._of_layer, strict=True)
        )
        if self._coded_starts is not None:
            of, coded, begins = self._coded_starts
            step = layer * own.batch * self._heads * 4
            own.coded.of = of + layer * self._heads * 4
            own.coded.lengths, own.coded.begins = coded + step, begins + step
        if own.noted:
            if ring is None:
                raise RuntimeError("queries are to be noted, but there is no ring")
            own.ring_rows, own.window = ring.shape[:2]
            own.ring = address("ring", ring, dtype, (*ring.shape[:2], heads, width))
        own.sinks = None
        if sinks is not None:
            own.sinks = address("sinks", sinks, torch.float32, (self._heads, self._group))
        code = library().reasonalloc_attend_paged(ctypes.byref(own), torch.get_num_threads())
        if code:
            raise failure(code)


def received(
    layout: Layout,
    queries: Tensor,
    table: Tensor,
    visible: Tensor,
    softcap: float | None,
    sinks: Tensor | None = None,
    coded: CodedRuns | None = None,
) -> Tensor:
    """Attention that each token receives from each query, averaged over the group.

    Where runs begin with coded tokens, their tokens are counted and not their places: token i is
    the coded token i, or lies at place begins + (i - lengths).

    Args:
        layout: of the pool.
        queries: [runs, group, asked, head_dim], scaled.
        table: [runs, columns] int32, pages of each run.
        visible: [runs, asked] int32, first tokens of the run that a query sees; 0: there is no such
            query.
        softcap: of the logits, or None.
        sinks: [runs, group] learned sinks, or None.
        coded: what runs begin with, or None.

    Returns:
        [runs, asked, columns * size], of coded runs [runs, asked, ``coded.tokens``], float32; 0
        where a query cannot see the token.

    Raises:
        RuntimeError: an argument is not so, or a run lies outside of the pool.
    """
    pool = layout.pool()
    queries, table, visible = queries.float().contiguous(), table.contiguous(), visible.contiguous()
    (runs, group, asked, _), columns = queries.shape, table.shape[1]
    tokens = columns * pool.size if coded is None else coded.tokens
    out = torch.empty(runs, asked, tokens, dtype=torch.float32, device="cpu")
    arguments = Received(
        pool=pool,
        queries=address("queries", queries, torch.float32, (runs, group, asked, pool.width)),
        table=address("table", table, torch.int32, (runs, columns)),
        visible=address("visible", visible, torch.int32, (runs, asked)),
        out=out.data_ptr(),
        runs=runs,
        group=group,
        asked=asked,
        columns=columns,
        tokens=tokens,
        softcap=softcap or 0.0,
    )
    if coded is not None:
        formats = _formats_of(layout, coded.rows)
        of, lengths, begins = (x.contiguous() for x in (coded.of, coded.lengths, coded.begins))
        arguments.coded = structs.CodedRuns(
            ctypes.addressof(formats),
            len(formats),
            *(
                address(name, tensor, torch.int32, (runs,))
                for name, tensor in (("of", of), ("lengths", lengths), ("begins", begins))
            ),
        )
    if sinks is not None:
        sinks = sinks.float().contiguous()
        arguments.sinks = address("sinks", sinks, torch.float32, (runs, group))
    code = library().reasonalloc_received(ctypes.byref(arguments), torch.get_num_threads())
    if code:
        raise failure(code)
    return out


def move_tokens(layout: Layout, source: Tensor, target: Tensor) -> None:
    """Copy tokens of a pool, keys and values, all read before any is written.

    Args:
        layout: of the pool.
        source, target: [...] int64, places: page * size + place in it. No two targets are the same,
            but 0, to which nothing is written.

    Raises:
        RuntimeError: an argument is not so, or a place lies outside of the pool.
    """
    source, target = source.contiguous(), target.contiguous()
    pool = layout.pool()
    code = library().reasonalloc_move_tokens(
        ctypes.byref(pool),
        address("source", source, torch.int64, source.shape),
        address("target", target, torch.int64, source.shape),
        source.numel(),
        torch.get_num_threads(),
    )
    if code:
        raise failure(code)
