"""Who is admitted, and who pauses when blocks run short; in numbers, without vLLM.

Admitted requests stand in the order of their admission. Each has *blocks* that are promised to it:
those of its prefill at first, more as it grows. Its *peak* is the most that it can need from now
on. At all times, for every admitted request ``k``:

    peak of k + blocks of all younger than k <= pool

A block that several hold counts once in such a sum: for the youngest of them that is in it. The
oldest can then always grow to its peak, so it runs until it is finished; the next one is the oldest
then, and the same holds for it. So every request finishes, and no blocks ever have to be taken
away. A request that grows changes only the sums of older ones, and a new one changes those of all;
whoever would break one of them pauses or waits. It keeps its blocks meanwhile. Requests that
finish, or need less after their first compression, make sums smaller. The oldest never pauses.

A request may share first blocks with others, pinned ones for as long as it runs, others until its
first compression, which then needs other ones to write to. Its peak holds those. Whoever lets go of
a block leaves it to an older one, for whom it counts then, in a sum that is the same or smaller.
Blocks that nobody shares now, but others might find later, stay if there is room for that moment,
besides that of all who wait (``extend``): nobody waits for it.

The oldest alone at work would be safe but slow. So the sums are kept with several peaks too: those
of request ``k`` and of the ones after it, up to ``_SURE`` of the pool. These all run at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, takewhile
from typing import Protocol

from reasonalloc.integrations.vllm.layout import Reserve

_SURE = 0.5  # of the pool
_REMEMBERED = 128  # answers


@dataclass
class Admitted:
    """A request.

    Attributes:
        reserve: what is known of the engine.
        start: tokens of its prefill.
        last: most tokens that it will have in the cache.
        most_shared: most of its blocks that others may hold too.
        tokens: in the cache, at the end of the step that is scheduled.
        own: blocks promised to it for layers under the budget.
    """

    reserve: Reserve
    start: int
    last: int
    most_shared: int = 0
    tokens: int = field(init=False)
    own: int = field(init=False)
    # The most of these, and the same of layers with sliding windows.
    _own_peak: int = field(init=False)
    _beside: int = field(init=False)
    _beside_peak: int = field(init=False)
    _prefilling: bool = True
    _first: int = field(init=False)  # tokens at its first compression

    def __post_init__(self) -> None:
        reserve = self.reserve
        self.own = reserve.needed(self.start, self.start)
        self._own_peak = max(self.own, reserve.peak(self.start, self.last, self.most_shared))
        self._beside = reserve.windows.prefill(self.start)
        self._beside_peak = max(self._beside, reserve.windows.peak(self.start, self.last))
        self.tokens = self.start
        self._first = reserve.first_event(self.start)

    @property
    def blocks(self) -> int:
        """Promised to it."""
        return self.own + self._beside

    @property
    def peak(self) -> int:
        """The most that it can need from now on."""
        return self._own_peak + self._beside_peak

    def share(self, blocks: int) -> None:
        """It will begin with so many blocks that others hold too."""
        self.own = max(self.own, self.reserve.needed(self.start, self.start, blocks))

    def is_first_event(self, tokens: int) -> bool:
        """Whether it is compressed for the first time after ``tokens`` tokens."""
        return min(tokens, self.last) == self._first

    def missing(self, tokens: int, shared: int = 0) -> int:
        """Blocks that it lacks for a step.

        Args:
            tokens: in the cache at the end of the step.
            shared: its first blocks that others hold too, if it is compressed then.
        """
        return self._missing_own(tokens, shared) + self._missing_beside(tokens)

    def grow(self, tokens: int, shared: int = 0) -> None:
        """Promise it what it lacks for a step; see ``missing``."""
        self.own += self._missing_own(tokens, shared)
        self._beside += self._missing_beside(tokens)

    def _missing_own(self, tokens: int, shared: int) -> int:
        held = self.own * self.reserve.block_size
        if self.own == self._own_peak or tokens <= held < self._first:
            return 0
        needed = self.reserve.needed(self.start, min(tokens, self.last), shared)
        return max(needed - self.own, 0)

    def _missing_beside(self, tokens: int) -> int:
        if self._beside == self._beside_peak:
            return 0
        windows = self.reserve.windows
        most = windows.prefill if self._prefilling else windows.decode
        return max(most(min(tokens, self.last)) - self._beside, 0)

    def peak_at(self, tokens: int) -> int:
        """The most that it needs if it ends with ``tokens`` tokens, and shares no block."""
        last, windows = min(tokens, self.last), self.reserve.windows
        beside = windows.peak(self.start, last) if self._prefilling else windows.decode(last)
        return max(self.blocks, self.reserve.peak(self.start, last) + beside)

    def prefilled(self) -> None:
        """Its prefill is computed: what lay behind its windows was given back."""
        if self._prefilling:
            self._prefilling = False
            self._beside = self.reserve.windows.decode(min(self.tokens, self.last))
            self._beside_peak = max(self._beside, self.reserve.windows.decode(self.last))

    def without(self, blocks: int, doubled: int) -> int:
        """``blocks`` that it may need, less those that count for a younger one.

        Args:
            blocks: of it alone, now or later.
            doubled: its first blocks that a younger one holds too.
        """
        if self.reserve.pin:  # it holds them to its end
            return blocks - doubled
        return max(blocks - doubled, min(blocks, self.reserve.blocks + self._beside_peak))

    def settle(self) -> None:
        """It was compressed for the first time: a constant number of blocks, besides windows."""
        self.own = self._own_peak = self.reserve.held(self.start)


class Answers:
    """How long answers were: what to expect of the next ones."""

    def __init__(self) -> None:
        self._tokens: dict[str, int] = {}
        self._tails: tuple[list[int], list[int]] | None = None

    def add(self, request_id: str, tokens: int) -> None:
        """An answer ended with so many tokens."""
        self._tokens.pop(request_id, None)
        self._tokens[request_id] = tokens
        if len(self._tokens) > _REMEMBERED:
            del self._tokens[next(iter(self._tokens))]
        self._tails = None

    def take_back(self, request_id: str) -> None:
        """It was no end: the request goes on."""
        if self._tokens.pop(request_id, None) is not None:
            self._tails = None

    def expected(self, tokens: int) -> int | None:
        """Mean tokens of answers that had at least ``tokens``; None if none was that long."""
        if self._tails is None:
            rising = sorted(self._tokens.values())
            self._tails = rising, [*accumulate(reversed(rising))][::-1]
        rising, sums = self._tails
        at = bisect_left(rising, tokens)
        return -(-sums[at] // (len(rising) - at)) if at < len(rising) else None


class Shared(Protocol):
    """What requests hold together; see ``BudgetManager``."""

    def shared(self, request_id: str) -> int:
        """First blocks of a request up to the last one that another one holds, too."""
        ...

    def prefix(self, request_id: str) -> Sequence[int]:
        """Numbers of the first blocks of a request that others may hold, too."""
        ...


class Admission:
    """Promises the blocks of a pool to requests.

    A request is admitted if its prefill's blocks can be promised to it, and if the pool holds what
    all admitted ones are expected to need at their ends: as much as finished requests whose
    answers were at least as long, or the peak where none was. Expectations that are wrong cost
    pauses, nothing else.

    Args:
        reserve: what is known of the engine.
        pool: blocks, the null block left out.
        answers: what is known of answers so far.
        shared: what requests hold together, now; None: nothing ever.
    """

    def __init__(
        self,
        reserve: Reserve,
        pool: int,
        answers: Answers | None = None,
        shared: Shared | None = None,
    ) -> None:
        self._reserve, self._pool, self._shared = reserve, pool, shared
        self._announced: dict[str, Admitted] = {}
        self._admitted: dict[str, Admitted] = {}  # the oldest first
        self._answers = answers or Answers()
        self._pausing = False
        self._waiting = 0
        self._sharing: set[str] = set()  # that were admitted with blocks of others
        self._doubled: dict[tuple[int, ...], list[int]] = {}  # what ``_held_twice`` found

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._admitted

    def announce(self, request_id: str, start: int, last: int) -> None:
        """Take note of a request that may be admitted next.

        Args:
            request_id: of the request.
            start: tokens of its prefill: the prompt, or all tokens if it is computed anew.
            last: most tokens that it will have in the cache.
        """
        if request_id not in self._admitted:
            self._announced[request_id] = self._request(start, last)

    def _request(self, start: int, last: int) -> Admitted:
        most = 0 if self._shared is None else self._reserve.most_shared(start, self._pool)
        return Admitted(self._reserve, start, last, most)

    def fits(self, start: int, last: int) -> bool:
        """Whether the pool holds a request, alone; see ``announce``."""
        return self._request(start, last).peak <= self._pool

    def start(self, request_id: str) -> int:
        """Tokens of a request's prefill."""
        return (self._admitted.get(request_id) or self._announced[request_id]).start

    def expect(self, requests: int) -> None:
        """So many requests wait that could be admitted in the next step."""
        self._waiting = requests

    def can_admit(self, request_id: str, hits: Sequence[int] = ()) -> bool:
        """Whether an announced request may be admitted in this step.

        Args:
            request_id: of the request.
            hits: numbers of its first blocks that it would have from others, who still hold them.
        """
        new = self._announced[request_id]
        new.share(len(hits))
        if self._pausing or new.peak > self._pool:
            return False
        if not self._admitted:
            return True
        doubled = self._held_twice(hits)
        if new.blocks > min(self._spare(doubled)):
            return False
        expected = sum(map(self._expected, self._admitted.values(), doubled))
        return expected + self._expected(new, 0) <= self._pool

    def admit(self, request_id: str) -> None:
        """Promise an announced request the blocks of its prefill; it is the youngest now.

        It holds those that it has from others already.
        """
        self._waiting = max(self._waiting - 1, 0)
        self._answers.take_back(request_id)
        self._admitted[request_id] = self._announced.pop(request_id)
        if self._shared is not None and self._shared.shared(request_id):
            self._sharing.add(request_id)
        self._doubled.clear()

    def prefilled(self, request_id: str) -> None:
        """A request's prefill is computed."""
        self._admitted[request_id].prefilled()

    def extend(self, request_id: str, blocks: int) -> int:
        """Promise a request up to ``blocks`` blocks in all, as far as nobody else lacks any.

        Room is left for as many requests like it as wait.

        Returns:
            Those that it may have, at most ``blocks``.
        """
        request = self._admitted[request_id]
        if blocks > request.own and not self._pausing:
            room = self._pool
            spares = self._spare(self._held_twice())
            for name, spare in zip(self._admitted, spares, strict=False):
                room = min(room, spare)
                if name == request_id:
                    break
            room -= self._waiting * request.blocks
            request.own += max(min(blocks - request.own, room), 0)
        return min(blocks, request.own)

    def settle(self, request_id: str) -> None:
        """A request was compressed for the first time, and holds what it shared no more."""
        self._admitted[request_id].settle()
        self._doubled.clear()

    def forget(self, request_id: str) -> None:
        """A request is finished, or begins anew later."""
        self._announced.pop(request_id, None)
        if (gone := self._admitted.pop(request_id, None)) is not None:
            self._answers.add(request_id, gone.tokens - gone.start)
            self._sharing.discard(request_id)
            self._doubled.clear()

    def pause(self, tokens: Mapping[str, int]) -> set[str]:
        """Promise the blocks of the next step; returns the requests that must pause in it.

        Blocks go to the oldest first. Once one lacks some, no younger one gets any; those that
        need none run on.

        Args:
            tokens: of the requests that could run, in the cache at the end of the step.
        """
        paused: set[str] = set()
        missing = {name: self._missing(name, n) for name, n in tokens.items()}
        spare = self._spare(self._held_twice()) if any(missing.values()) else ()
        least = self._pool
        for (name, request), room in zip(self._admitted.items(), spare, strict=False):
            least = min(least, room)
            if more := missing.get(name, 0):
                if paused or more > least:
                    paused.add(name)
                    continue
                request.grow(tokens[name], self._shared_by(name, tokens[name]))
                least -= more
        for name in tokens.keys() - paused:
            self._admitted[name].tokens = tokens[name]
        self._pausing = bool(paused)
        return paused

    def _missing(self, request_id: str, tokens: int) -> int:
        return self._admitted[request_id].missing(tokens, self._shared_by(request_id, tokens))

    def _shared_by(self, request_id: str, tokens: int) -> int:
        """First blocks of a request that others hold, if it is compressed for the first time."""
        if self._shared is None or not self._admitted[request_id].is_first_event(tokens):
            return 0
        return self._shared.shared(request_id)

    def _held_twice(self, hits: Sequence[int] = ()) -> list[int]:
        """[admitted] first blocks of each request that a younger one holds, too.

        Args:
            hits: blocks that a new one would hold, the youngest of all.
        """
        if self._shared is None or not (self._sharing or hits):
            return [0] * len(self._admitted)
        key = tuple(hits)
        if key not in self._doubled:
            seen, doubled = set(hits), []
            for name in reversed(self._admitted):
                row = self._shared.prefix(name)
                # Who holds a block holds those before it.
                doubled.append(sum(1 for _ in takewhile(seen.__contains__, row)))
                seen.update(row)
            self._doubled[key] = doubled[::-1]
        return self._doubled[key]

    def _spare(self, doubled: Sequence[int]) -> list[int]:
        """[admitted + 1] blocks that may go to a request and all younger ones.

        Place ``k`` has the least of all sums that count the blocks of request ``k`` and, of those
        before it, only peaks. The last place is that of a new request.

        Args:
            doubled: [admitted] blocks of each that count for a younger one.
        """
        requests = [*self._admitted.values()]
        count = len(requests)
        blocks = [r.blocks - n for r, n in zip(requests, doubled, strict=True)]
        peak = [r.without(r.peak, n) for r, n in zip(requests, doubled, strict=True)]
        younger = [*accumulate(reversed(blocks), initial=0)][::-1]
        spare = [self._pool] * (count + 1)
        end, peaks = 0, 0
        for k in range(count):
            spare[k + 1] = min(spare[k + 1], self._pool - peak[k] - younger[k + 1])
            if end <= k:
                end, peaks = k + 1, peak[k]
            while end < count and peaks + peak[end] <= _SURE * self._pool:
                peaks += peak[end]
                end += 1
            spare[end] = min(spare[end], self._pool - peaks - younger[end])
            peaks -= peak[k]
        return spare

    def _expected(self, request: Admitted, doubled: int) -> int:
        """Blocks that a request is expected to need at its end, and no younger one holds."""
        answer = self._answers.expected(request.tokens - request.start + 1)
        if answer is None:
            most = min(request.peak, request.peak_at(request.last))
        else:
            most = request.peak_at(request.start + answer)
        return request.without(most, doubled)
