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

from collections.abc import Mapping, Sequence
from itertools import accumulate, takewhile
from typing import Protocol

from reasonalloc.integrations.vllm.admitted import Admitted
from reasonalloc.integrations.vllm.answers import Answers
from reasonalloc.integrations.vllm.forecast import most_expected
from reasonalloc.integrations.vllm.layout import Reserve

_SURE = 0.3  # of the pool


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
    all admitted ones are expected to need together at any time from now on. Answers are expected to
    end as those of finished requests did that were as long. Expectations that are wrong cost
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
        together = [*self._admitted.values(), new]
        sure = _SURE * self._pool
        return most_expected(together, [*doubled, 0], self._answers, sure) <= self._pool

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
