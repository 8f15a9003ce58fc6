"""The tokens of runs by their rank, whatever pages hold them: for policies, and to be moved."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reasonalloc.integrations.vllm.coding import Coding
from reasonalloc.integrations.vllm.pages import Pages
from reasonalloc.integrations.vllm.runs import Runs, send
from reasonalloc.ops.native.paged import CodedPages, CodedRuns
from reasonalloc.ops.page_rows import PageRows

_KEPT_LISTS = 64  # of rows, whose heads were sorted by format


@dataclass(frozen=True)
class View:
    """Runs of ``n`` (layer, request) pairs, ``H`` KV heads each, of at most ``N`` tokens.

    Attributes:
        runs: the tables.
        layers: [n] int64.
        pages: [n, H, pages] int32, in the pool; those behind a run's end are of no meaning.
        lengths: [n, H] int32, tokens of each.
        positions: [n, H, N] int32, of the tokens in their sequence.
        shift: [n, H] int32, rank of a token less its position, of those that were never moved.
    """

    runs: Runs
    layers: Tensor
    pages: Tensor
    lengths: Tensor
    positions: Tensor
    shift: Tensor

    def part(self, rows: slice) -> View:
        """Some of the pairs."""
        return self._part(rows, "layers", "pages", "lengths", "positions", "shift")

    def _part(self, rows: slice, *names: str, **more: Any) -> View:
        own = {name: getattr(self, name)[rows] for name in names}
        return dataclasses.replace(self, **own, **more)

    def numbers(self, part: int) -> Tensor:
        """[n, H, N, head_dim]: keys (``part`` 0) or values (1)."""
        pages = self.runs.pages
        return (pages.values_of if part else pages.keys_of)(self.pages, self.layers)

    def state(self) -> Tensor | None:
        """[n, H, N, channels] float32, a copy of what the policy knows; None: it keeps none."""
        states = self.runs.states
        return None if states is None else states[self.pages].flatten(2, 3)

    def write_state(self, state: Tensor) -> None:
        """Put ``state`` back; pages behind the ends of runs belong to others."""
        states = self.runs.states
        if states is None:
            raise RuntimeError("runs without state")
        size = states.shape[1]
        begins = torch.arange(self.pages.shape[-1], device=state.device) * size
        # What is behind goes to the null block, which nobody reads.
        own = self.pages.where(begins < self.lengths[..., None], 0)
        states[own] = state.unflatten(2, (-1, size))


class CodedPool:
    """Pages of coded tokens, as numbers of four bytes.

    Args:
        coding: of the layers of this process.
        pages: the pool.
        device: of it.

    Attributes:
        bytes: [pages, page_bytes] uint8.
        words: [pages, page_bytes / 4] int32; floats: the same as float32.
        per_page: [L, H] int64, tokens of a page of each head.
        width, beside: [L, H] int64, words from row to row, and before a row's position.
        of: [L, H] int32, ``coding.of``.
    """

    def __init__(self, coding: Coding, pages: Pages, device: torch.device) -> None:
        self.coding = coding
        self.bytes = pages.memory.view(torch.uint8)
        self.words, self.floats = (pages.memory.view(t) for t in (torch.int32, torch.float32))
        tables = [(own.per_page, own.width // 4, own.beside_at // 4) for own in coding.rows]
        found = [
            torch.tensor(
                [tables[i][n] for of in coding.of for i in of], dtype=torch.int64, device=device
            )
            for n in range(3)
        ]
        shape = (len(coding.of), -1)
        self.per_page, self.width, self.beside = (t.view(shape) for t in found)
        self.of = torch.tensor(coding.of, dtype=torch.int32, device=device)
        self._device = device
        self._lists: dict[tuple[int, ...], list[tuple[PageRows, Tensor]]] = {}

    @property
    def in_loops(self) -> CodedPages:
        """The same for our loops on processors."""
        return CodedPages(self.coding.rows, self.of)

    def by_format(self, layers: Sequence[int]) -> list[tuple[PageRows, Tensor]]:
        """The formats of rows of heads, and which they are: ``row * H + head``, [m] int64.

        Args:
            layers: of each row.
        """
        key = tuple(layers)
        if key not in self._lists:
            if len(self._lists) >= _KEPT_LISTS:
                self._lists.clear()
            of = [number for layer in layers for number in self.coding.of[layer]]
            found = {n: [i for i, own in enumerate(of) if own == n] for n in sorted(set(of))}
            lists = send(self._device, *found.values())
            self._lists[key] = [
                (self.coding.rows[n], own) for n, own in zip(found, lists, strict=True)
            ]
        return self._lists[key]


@dataclass(frozen=True)
class CodedView(View):
    """Runs that begin with coded tokens.

    Attributes:
        pool: their pages.
        numbered: [n] host's numbers of ``layers``.
        coded, begin: [n, H] int64, see ``Runs``.
        places: where the tokens lie.
        start: most tokens of a prefill of the requests.
        most_coded: most coded tokens of a run.
    """

    pool: CodedPool
    numbered: tuple[int, ...]
    coded: Tensor
    begin: Tensor
    places: CodedPlaces
    start: int
    most_coded: int

    def part(self, rows: slice) -> View:
        """Some of the pairs."""
        names = ("layers", "pages", "lengths", "positions", "shift", "numbered", "coded", "begin")
        places = CodedPlaces(*(place[rows] for place in self.places))
        return self._part(rows, *names, places=places)

    def in_loops(self) -> CodedRuns:
        """What our loops on processors must know of ``n * H`` runs."""
        of = self.pool.of[self.layers].flatten()
        coded, begin = (t.flatten().int() for t in (self.coded, self.begin))
        return CodedRuns(self.pool.coding.rows, of, coded, begin, self.positions.shape[-1])

    def _first(self, counts: Tensor) -> Tensor:
        """[n, H, N, 1] bool: among the first ``counts`` [n, H] tokens of its run."""
        index = torch.arange(self.positions.shape[-1], device=counts.device)
        return (index < counts[..., None])[..., None]

    @cached_property
    def _there(self) -> Tensor:
        """[n, H, N, 1] bool: a token, not what lies behind a run's end."""
        return self._first(self.lengths)

    @cached_property
    def _is_coded(self) -> Tensor:
        """[n, H, N, 1] bool."""
        return self._first(self.coded)

    @cached_property
    def _keys_values(self) -> tuple[Tensor, ...]:
        # Behind a run's end lie bits of others, which may be no numbers.
        plain = self.runs.pages.read(self.places.plain)
        found = tuple(numbers.masked_fill(~self._there, 0) for numbers in plain)
        count = min(self.most_coded, self.positions.shape[-1])
        if not count:
            return found
        coded = (self.places.page, self.places.row, self._is_coded)
        place = [t.flatten(0, 1)[:, :count] for t in coded]
        for form, own in self.pool.by_format(self.numbered):
            page, row, mask = (t[own] for t in place)
            for numbers, decoded in zip(
                found, form.decode(form.view(self.pool.bytes)[page, row]), strict=True
            ):
                flat = numbers.flatten(0, 1)
                flat[own, :count] = decoded.to(flat.dtype).where(mask, flat[own, :count])
        return found

    def numbers(self, part: int) -> Tensor:
        """See ``View.numbers``; decoded, in the type of plain ones."""
        return self._keys_values[part]

    def state(self) -> Tensor | None:
        """See ``View.state``."""
        known = self.runs.state
        if known is None:
            return None
        coded = self.pool.floats.flatten()[self._beside(known.shape[-1])]
        state = coded.where(self._is_coded, known[self.places.plain])
        return state.masked_fill(~self._there, 0)

    def _beside(self, channels: int) -> Tensor:
        """[n, H, N, channels] int64: words of what the policy knows of coded tokens."""
        first = self.places.word[..., None] + 1
        return first + torch.arange(channels, device=first.device)

    def write_state(self, state: Tensor) -> None:
        """See ``View.write_state``."""
        known = self.runs.state
        if known is None:
            raise RuntimeError("runs without state")
        # What is elsewhere goes to the null block, which nobody reads.
        plain = (self._there & ~self._is_coded)[..., 0]
        known[self.places.plain.where(plain, 0)] = state
        words = self._beside(state.shape[-1]).where(self._is_coded, 0)
        self.pool.floats.view(-1)[words] = state
        self.pool.bytes[:1].zero_()


class CodedPlaces(NamedTuple):
    """Where tokens lie by their rank; [n, H, N] int64 each.

    Attributes:
        plain: place of a plain token in the pool; 0 of coded ones.
        page, row: page of a coded token, and which of it it is; 0 of plain ones.
        word: of a coded token's position.
    """

    plain: Tensor
    page: Tensor
    row: Tensor
    word: Tensor


def places_of(
    runs: Runs,
    pool: CodedPool,
    layers: Tensor,
    pages: Tensor,
    coded: Tensor,
    begin: Tensor,
    tokens: int,
) -> CodedPlaces:
    """Where the first tokens of runs lie.

    Args:
        runs, pool: of the process.
        layers: [n] int64; pages: [n, H, pages] int32; coded, begin: [n, H] int64.
        tokens: how many of each run; those behind its end are of no meaning.
    """
    size = runs.layout.reserve.block_size
    index, columns = torch.arange(tokens, device=pages.device), pages.shape[-1]
    is_coded, pages = index < coded[..., None], pages.long()
    place = (begin - coded)[..., None] + index
    own = pages.gather(2, (place // size).clamp(0, columns - 1))
    plain = (own * size + place % size).masked_fill(is_coded, 0)
    per_page = pool.per_page[layers][..., None]
    page = pages.gather(2, (index // per_page).clamp_max(columns - 1)).where(is_coded, 0)
    row = (index % per_page).where(is_coded, 0)
    word = page * pool.words.shape[1] + row * pool.width[layers][..., None]
    return CodedPlaces(plain, page, row, word + pool.beside[layers][..., None])


def view_runs(
    runs: Runs,
    pool: CodedPool | None,
    numbered: Sequence[int],
    tables: tuple[Tensor, Tensor, Tensor],
    blocks: Tensor,
    longest: int,
    start: int,
    compressed: bool,
) -> View:
    """Where the tokens of (layer, request) pairs lie.

    Args:
        runs: the tables.
        pool: of coded pages; None: there are none.
        numbered: layers of the pairs, as the host knows them.
        tables: layers, slots, tokens: [n] int64, the pairs and how many tokens the requests have
            seen.
        blocks: [n, m] int32, the requests' blocks.
        longest: upper bound of the tokens in a run.
        start: most tokens of a prefill of the requests.
        compressed: whether any of the requests was compressed before.
    """
    layers, slots, tokens = tables
    size = runs.layout.reserve.block_size
    shift, kept = runs.shift[layers, slots], runs.kept[layers, slots]
    columns = -(-longest // size)
    if pool is not None and compressed:
        columns = max(columns, runs.layout.longest_run(start))
    pages = runs.numbered(runs.first[layers, slots], runs.plain[slots], layers, blocks, columns)
    if pool is None:
        index = torch.arange(columns * size, dtype=torch.int32, device=runs.device)
        stored = runs.positions.view(-1, size)[pages].flatten(-2)
        positions = torch.where(index < kept[..., None], stored, index - shift[..., None])
        if runs.layout.reserve.pin:
            leading = runs.plain[slots].clamp_max(columns) * size
            positions = torch.where(index < leading[:, None, None], index, positions)
        return View(runs, layers, pages, shift + tokens[:, None].int(), positions, shift)
    coded, begin = (t[layers, slots].long() for t in (runs.coded, runs.begin))
    own = places_of(runs, pool, layers, pages, coded, begin, longest)
    index = torch.arange(longest, dtype=torch.int32, device=runs.device)
    rank = (shift - begin + coded).int()  # less the position
    behind = (kept - begin + coded)[..., None]
    positions = torch.where(index < behind, runs.positions[own.plain], index - rank[..., None])
    positions = pool.words.flatten()[own.word].where(index < coded[..., None], positions)
    return CodedView(
        runs,
        layers,
        pages,
        rank + tokens[:, None].int(),
        positions,
        rank,
        pool,
        tuple(numbered),
        coded,
        begin,
        own,
        start,
        runs.layout.most_coded(start) if compressed else 0,
    )
