"""Tokens that stay at a boundary take their new places in the pool: all are read before any write.

All rows are moved together, and places of kept tokens follow from how many each head keeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.integrations.vllm.views import CodedView, View
from reasonalloc.ops.native.paged import Layout, move_tokens
from reasonalloc.ops.page_rows import PageRows

_ENCODED_BYTES = 128 << 20  # of numbers that are coded at a time, in float32


@dataclass(frozen=True)
class Rows:
    """Rows that are dealt with together, as tensors. ``n`` rows, ``H`` KV heads.

    Attributes:
        layers, slots, tokens, starts, totals, moved, rooms, leading, before, queries: [n] int64.
        offsets: [n] int64, first page of each row's layer.
        blocks: [n, blocks] int32.
        view: where their tokens lie.
    """

    layers: Tensor
    slots: Tensor
    tokens: Tensor
    starts: Tensor
    totals: Tensor
    moved: Tensor
    rooms: Tensor
    leading: Tensor
    before: Tensor
    queries: Tensor
    offsets: Tensor
    blocks: Tensor
    view: View

    def part(self, rows: slice) -> Rows:
        """Some of them."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "view"]
        own = {name: getattr(self, name)[rows] for name in names}
        return dataclasses.replace(self, **own, view=self.view.part(rows))


@dataclass(frozen=True)
class Kept:
    """What stays of ``n`` rows of ``H`` KV heads with at most ``N`` tokens, and where it goes.

    Attributes:
        keep: [n, H, N] bool.
        budgets: [n, H] int64, how many that are.
        most_moved: most tokens of a row that change their place.
        compressed: whether all rows were compressed before.
    """

    keep: Tensor
    budgets: Tensor
    most_moved: int
    compressed: bool


def move(rows: Rows, kept: Kept, layout: Layout | None) -> None:
    """Move what stays, and note where it is.

    Args:
        rows, kept: what stays of which.
        layout: of the pool, where our own loops move tokens, or None.
    """
    if isinstance(rows.view, CodedView):
        _move_coded(rows, rows.view, kept)
    else:
        _move_plain(rows, rows.view, kept, layout)


def _move_plain(rows: Rows, view: View, kept: Kept, layout: Layout | None) -> None:
    runs, keep, budgets = view.runs, kept.keep, kept.budgets
    size = runs.layout.reserve.block_size
    stays = rows.leading * size
    pages = (budgets - stays[:, None] + rows.rooms[:, None] + size - 1) // size
    first = (rows.offsets[:, None] + pages.cumsum(dim=1) - pages).int()
    # What moves, one head after the other: as many tokens for every request.
    width = kept.most_moved
    moves = keep
    if runs.layout.reserve.pin:
        moves = keep & (torch.arange(keep.shape[-1], device=keep.device) >= stays[:, None, None])
    chosen = moves.flatten(1).to(torch.int8).argsort(dim=1, descending=True, stable=True)
    chosen = chosen[:, :width]
    real = torch.arange(chosen.shape[1], device=chosen.device) < rows.moved[:, None]
    rank = (moves.cumsum(dim=-1) - 1).flatten(1).gather(1, chosen).clamp_min(0)
    head = chosen // keep.shape[-1]
    first += ((rows.before - rows.leading) * runs.per_block)[:, None].int()
    behind = first + (rows.leading * runs.per_block)[:, None].int()
    none = torch.zeros_like(rows.slots)
    target = runs.numbered(behind, none, view.layers, rows.blocks, -(-width // size))
    # What is too much goes to the null block, which nobody reads.
    to = _places(target, head, rank, size).where(real, 0)
    source = _places(view.pages, head, chosen % keep.shape[-1], size)
    if layout is None:
        runs.pages.write(to, *runs.pages.read(source))
    else:
        move_tokens(layout, source, to)
    runs.positions[to] = view.positions.flatten(1).gather(1, chosen)
    if runs.state is not None:
        runs.state[to] = runs.state[source]
    _note(rows, first, budgets - rows.tokens[:, None], budgets)


def _note(rows: Rows, first: Tensor, shift: Tensor, ends: Tensor) -> None:
    """Write the tables: [n, H] each, see ``Runs``; ``ends``: of the tokens that are there now."""
    runs, at = rows.view.runs, (rows.layers, rows.slots)
    runs.first[at] = first.int()
    runs.shift[at] = shift.int()
    runs.kept[at] = ends.int()
    runs.plain[rows.slots] = rows.leading.int()
    runs.version += 1


def _move_coded(rows: Rows, view: CodedView, kept: Kept) -> None:
    runs, pool, budgets = view.runs, view.pool, kept.budgets
    coding, reserve = pool.coding, runs.layout.reserve
    size = reserve.block_size
    tails = budgets.clamp_max(coding.window)
    coded = budgets - tails
    per_page = pool.per_page[view.layers]
    pages = (coded + per_page - 1) // per_page
    begin = pages * size
    pages = pages + coding.tail_pages(reserve.interval, size)
    first = rows.offsets[:, None] + pages.cumsum(dim=1) - pages
    first += (rows.before * runs.per_block)[:, None]
    none = torch.zeros_like(rows.slots)
    columns = runs.layout.longest_run(view.start)
    target = runs.numbered(first.int(), none, view.layers, rows.blocks, columns).long()
    order = kept.keep.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    order = order[..., : runs.layout.most_coded(view.start) + coding.window]
    tail = _Tail.of(view, order, coded, tails)
    slot = begin[..., None] + torch.arange(coding.window, device=begin.device)
    # What is too much goes to the null block, which nobody reads.
    to = (target.gather(2, slot // size) * size + slot % size).where(tail.real, 0)
    written = list(_coded_rows(view, kept, order, coded, target))
    for form, page, row, coded_rows in written:
        form.view(pool.bytes)[page, row] = coded_rows
    runs.pages.write(to, tail.keys, tail.values)
    pool.bytes[:1].zero_()  # numbers, for kernels that multiply what they hide by zero
    runs.positions[to] = tail.positions
    if runs.state is not None and tail.state is not None:
        runs.state[to] = tail.state
    at, ends = (rows.layers, rows.slots), begin + tails
    runs.coded[at], runs.begin[at] = coded.int(), begin.int()
    _note(rows, first, ends - rows.tokens[:, None], ends)


@dataclass(frozen=True)
class _Tail:
    """The newest tokens of runs, which stay as they are: [n, H, window, ...]; ``real``: there."""

    real: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    state: Tensor | None

    @classmethod
    def of(cls, view: CodedView, order: Tensor, coded: Tensor, tails: Tensor) -> _Tail:
        index = torch.arange(view.pool.coding.window, device=order.device)
        behind = (coded[..., None] + index).clamp_max(order.shape[-1] - 1)
        chosen = order.gather(2, behind)
        place = view.places.plain.gather(2, chosen)
        state = view.runs.state
        return cls(
            index < tails[..., None],
            *view.runs.pages.read(place),
            view.positions.gather(2, chosen),
            None if state is None else state[place],
        )


def _coded_rows(
    view: CodedView, kept: Kept, order: Tensor, coded: Tensor, target: Tensor
) -> Iterator[tuple[PageRows, Tensor, Tensor, Tensor]]:
    """Rows of coded tokens and where they go: format, [m, c] page and row in it, [m, c, width].

    Args:
        view, kept: see ``move``.
        order: [n, H, k] int64, ranks of kept tokens, rising.
        coded: [n, H] int64, how many of them are to be coded, the first ones.
        target: [n, H, pages] int64, of the new runs.
    """
    flat = [
        t.flatten(0, 1)
        for t in (order, coded, view.coded, target, view.places.page, view.places.row)
    ]
    count = min(view.runs.layout.most_coded(view.start), order.shape[-1])
    index = torch.arange(count, device=order.device)
    for form, own in _slices(view, _most_encoded(view, kept, count)):
        ranks, coded_now, coded_before, pages, page, row = (t[own] for t in flat)
        ranks = ranks[:, :count]
        was = ranks < coded_before[:, None]
        memory = form.view(view.pool.bytes)
        there = memory[page.gather(1, ranks), row.gather(1, ranks)]
        fresh = _encoded(view, kept, form, own, ranks, coded_before)
        place = pages.gather(1, (index // form.per_page).expand(len(own), -1))
        real = index < coded_now[:, None]
        rows = there.where(was[..., None], fresh)
        yield form, place.where(real, 0), (index % form.per_page).where(real, 0), rows


def _most_encoded(view: CodedView, kept: Kept, count: int) -> int:
    """Most tokens of a head that are to be encoded, of ``count`` that are coded then."""
    if not kept.compressed:
        return count
    return min(count, view.pool.coding.window + view.runs.layout.reserve.interval)


def _slices(view: CodedView, count: int) -> Iterator[tuple[PageRows, Tensor]]:
    """Formats and rows of heads, as ``CodedPool.by_format``, few enough to be coded at a time.

    Args:
        view: of them.
        count: tokens of each that are encoded.
    """
    one = count * view.runs.pages.memory[0].numel() * 4 // view.runs.layout.reserve.block_size
    most = max(1, _ENCODED_BYTES // max(one, 1))
    for form, own in view.pool.by_format(view.numbered):
        for some in own.split(most):
            yield form, some


def _encoded(
    view: CodedView, kept: Kept, form: PageRows, own: Tensor, ranks: Tensor, coded: Tensor
) -> Tensor:
    """[m, c, width] uint8, of tokens that are plain yet; of others anything.

    Args:
        view, kept: see ``move``.
        form: how heads ``own`` are coded: [m] int64, rows of ``n * H``.
        ranks: [m, c] int64, of their tokens.
        coded: [m] int64, how many are coded already, the first ones.
    """
    runs, last = view.runs, view.positions.shape[-1] - 1
    tail = _most_encoded(view, kept, ranks.shape[1])
    few = tail < ranks.shape[1]
    wanted = ranks
    if few:  # every plain token once, and then those that stay
        index = torch.arange(tail, device=ranks.device)
        wanted = (coded[:, None] + index).clamp_max(last)
    place = view.places.plain.flatten(0, 1)[own].gather(1, wanted)
    positions = view.positions.flatten(0, 1)[own].gather(1, wanted)
    keys, values = runs.pages.read(place)
    state = keys.new_zeros(0) if runs.state is None else runs.state[place]
    rows = form.encode(keys, values, positions, state)
    if not few:
        return rows
    chosen = (ranks - coded[:, None]).clamp(0, tail - 1)
    return rows.gather(1, chosen[..., None].expand(-1, -1, form.width))


def _places(pages: Tensor, head: Tensor, index: Tensor, size: int) -> Tensor:
    """Pool slots (page * block_size + place) of the tokens at ``index`` of runs.

    Args:
        pages: [n, H, pages] int32.
        head, index: [n, m] int64, which run of the row and where in it.
        size: tokens of a page.

    Returns:
        [n, m] int64.
    """
    flat = pages.flatten(1).gather(1, head * pages.shape[-1] + index // size)
    return flat.long() * size + index % size
