"""A request that was admitted to the pool: the blocks that it has and those that it may need."""

from __future__ import annotations

from dataclasses import dataclass, field

from reasonalloc.integrations.vllm.layout import Reserve


@dataclass
class Admitted:
    """A request.

    Attributes:
        reserve: what is known of the engine.
        start: tokens of its prefill.
        last: most tokens that it will have in the cache.
        most_shared: most of its blocks that others may hold too.
        tokens: in the cache, at the end of the step that is scheduled.
        first: tokens at its first compression.
        own: blocks promised to it for layers under the budget.
    """

    reserve: Reserve
    start: int
    last: int
    most_shared: int = 0
    tokens: int = field(init=False)
    first: int = field(init=False)
    own: int = field(init=False)
    # The most of these, and the same of layers with sliding windows.
    _own_peak: int = field(init=False)
    _beside: int = field(init=False)
    _beside_peak: int = field(init=False)
    _prefilling: bool = True

    def __post_init__(self) -> None:
        reserve = self.reserve
        self.own = reserve.needed(self.start, self.start)
        self._own_peak = max(self.own, reserve.peak(self.start, self.last, self.most_shared))
        self._beside = reserve.windows.prefill(self.start)
        self._beside_peak = max(self._beside, reserve.windows.peak(self.start, self.last))
        self.tokens = self.start
        self.first = reserve.first_event(self.start)

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
        return min(tokens, self.last) == self.first

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
        if self.own == self._own_peak or tokens <= held < self.first:
            return 0
        needed = self.reserve.needed(self.start, min(tokens, self.last), shared)
        return max(needed - self.own, 0)

    def _missing_beside(self, tokens: int) -> int:
        if self._beside == self._beside_peak:
            return 0
        windows = self.reserve.windows
        most = windows.prefill if self._prefilling else windows.decode
        return max(most(min(tokens, self.last)) - self._beside, 0)

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
        if self.reserve.stays:  # it holds them to its end
            return blocks - doubled
        own = self.reserve.own(self.start)
        return max(blocks - doubled, min(blocks, own + self._beside_peak))

    def settle(self) -> None:
        """It was compressed for the first time: a constant number of blocks, besides windows."""
        self.own = self._own_peak = self.reserve.held(self.start)
