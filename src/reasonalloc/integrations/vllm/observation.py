"""What a policy knows of every token in the pool, by the attention that the token received.

vLLM's kernels do not tell attention weights. Nothing is evicted between two boundaries, so they are
computed later from the same queries and keys: those of a prefill right after its attention, those
of decode steps for ``FLUSH`` of them at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.integrations.vllm.runs import QueryRows, Runs, Tracked, send
from reasonalloc.integrations.vllm.views import CodedPool, CodedView, View, view_runs
from reasonalloc.ops.native.paged import Layout
from reasonalloc.ops.native.paged import received as received_in_pages
from reasonalloc.policies import Policy
from reasonalloc.sinks import softmax

FLUSH = 16  # decode steps whose queries are kept until their attention is computed
_LOGIT_BYTES = 256 << 20  # of explicit logits at a time
# What each token receives, [n, H, q, tokens] float32, averaged over the group, from queries
# [n, H, group, q, head_dim], scaled, that see the first tokens of their runs: [n, H, q] int64, 0 of
# those that are none.
Receive = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Unseen:
    """Decode steps whose attention the policy has not seen: those before ``tokens`` tokens.

    ``row``: of the batch.
    """

    request: Tracked
    row: int
    tokens: int


class PoolObserver:
    """Updates the policy's state in vLLM's pool.

    Args:
        policy: has ``state_channels``.
        runs, queries: where tokens lie, the last queries.
        scaling, softcap: of the attention logits.
        sinks: [L, H, group] float32 learned sinks, see ``reasonalloc.sinks``, or None.
        layout: of the pool, where our own loops read it (``ops.native.paged``), or None.
        coded: pages of coded tokens, or None.
    """

    def __init__(
        self,
        policy: Policy,
        runs: Runs,
        queries: QueryRows,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None = None,
        layout: Layout | None = None,
        coded: CodedPool | None = None,
    ) -> None:
        self._policy, self._runs, self._queries = policy, runs, queries
        self._layout, self._coded = layout, coded
        self._scaling, self._softcap, self._sinks = scaling, softcap, sinks

    def steps(self, unseen: Sequence[Unseen], blocks: Tensor) -> None:
        """Take in the attention of decode steps, of all layers.

        Args:
            unseen: at most ``FLUSH`` steps of each request; their queries are remembered.
            blocks: [batch, n] int32, blocks of all requests of the batch.
        """
        pairs = [(item, layer) for layer in range(self._runs.layers) for item in unseen]
        longest = max(item.request.most(item.tokens) for item in unseen)
        for some in self._parts(pairs, longest):
            self._observe(some, blocks, longest)
        for item in unseen:
            item.request.observed = item.tokens

    def prefill(
        self, layer: int, query: Tensor, request: Tracked, before: int, blocks: Tensor
    ) -> None:
        """Take in the attention of a piece of a prompt.

        Args:
            layer: which.
            query: [tokens, query_heads, head_dim], of the piece.
            request: whose; it holds every token before the piece, and the piece.
            before: tokens before the piece.
            blocks: [n] int32, of the request.
        """
        runs, after = self._runs, before + len(query)
        slot, index, tokens = send(runs.device, [request.slot], [layer], [after])
        tables = (index, slot, tokens)
        view = view_runs(
            runs, self._coded, [layer], tables, blocks[None], after, request.start, False
        )
        asked = query.transpose(0, 1).unflatten(0, (1, runs.heads, -1))
        positions = torch.arange(before, after, device=runs.device)[None]
        real = torch.ones_like(positions, dtype=torch.bool)
        self._take_in(view, asked, positions, real)

    def _parts(
        self, pairs: list[tuple[Unseen, int]], longest: int
    ) -> Iterator[list[tuple[Unseen, int]]]:
        pages = self._runs.pages
        one = self._runs.heads * longest * (pages.keys.shape[-1] * 2 + FLUSH * 8) * 4
        size = max(1, _LOGIT_BYTES // one)
        for start in range(0, len(pairs), size):
            yield pairs[start : start + size]

    def _observe(self, pairs: list[tuple[Unseen, int]], blocks: Tensor, longest: int) -> None:
        runs = self._runs
        items = [item for item, _ in pairs]
        batch, layers, slots, tokens, first, rows = send(
            runs.device,
            [item.row for item in items],
            [layer for _, layer in pairs],
            [item.request.slot for item in items],
            [item.tokens for item in items],
            [item.request.observed for item in items],
            [item.request.queries or 0 for item in items],
        )
        numbers, tables = [layer for _, layer in pairs], (layers, slots, tokens)
        moved = any(item.request.longest is not None for item in items)
        start = max(item.request.start for item in items)
        view = view_runs(runs, self._coded, numbers, tables, blocks[batch], longest, start, moved)
        positions = tokens[:, None] + torch.arange(-FLUSH, 0, device=runs.device)
        asked = self._queries.read(layers, rows, positions, runs.heads)
        self._take_in(view, asked, positions, positions >= first[:, None])

    def _take_in(self, view: View, asked: Tensor, positions: Tensor, real: Tensor) -> None:
        """Let the policy see queries.

        Args:
            view: the runs.
            asked: [n, H, group, q, head_dim].
            positions: [n, q] int64, of the queries in their sequence.
            real: [n, q] bool, whether there is such a query.
        """
        state = view.state()
        if state is None:
            raise RuntimeError("runs without state")
        n, heads, group, queries, _ = asked.shape
        own = view.shift[..., None] + positions[:, None]
        visible = (own + 1).clamp_min(0) * real[:, None]
        ages = positions.float()[:, None, :, None], view.positions.float()[:, :, None]
        if self._layout is None:
            receive, rows = self._by_products(view), group
        else:
            receive, rows = self._by_loop(self._layout, view), 1
        most = max(1, _LOGIT_BYTES // (n * heads * rows * state.shape[2] * 8))
        for start in range(0, queries, most):
            some = slice(start, min(start + most, queries))
            received = receive(asked[:, :, :, some].float() * self._scaling, visible[..., some])
            self._policy.observe(state, received, ages[0][:, :, some] - ages[1])
        view.write_state(state)

    def _by_loop(self, layout: Layout, view: View) -> Receive:
        """By our own loop, which reads keys where they lie."""
        sinks = None if self._sinks is None else self._sinks[view.layers].flatten(0, 1)
        coded = view.in_loops() if isinstance(view, CodedView) else None

        def receive(queries: Tensor, visible: Tensor) -> Tensor:
            runs = [t.flatten(0, 1) for t in (queries, view.pages, visible.int())]
            given = (runs[0], runs[1], runs[2], self._softcap, sinks, coded)
            own = received_in_pages(layout, *given)
            return own.unflatten(0, view.pages.shape[:2])

        return receive

    def _by_products(self, view: View) -> Receive:
        """By products of matrices, on any device."""
        keys = view.numbers(0).float().transpose(-1, -2)
        index = torch.arange(keys.shape[-1], device=keys.device)
        sinks = None if self._sinks is None else self._sinks[view.layers][..., None]

        def receive(queries: Tensor, visible: Tensor) -> Tensor:
            logits = (queries.flatten(2, 3) @ keys).unflatten(2, queries.shape[2:4])
            if self._softcap is not None:
                logits = torch.tanh(logits / self._softcap) * self._softcap
            hidden = (index >= visible[..., None])[:, :, None]
            logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
            # Sinks of every query, as rows are of several layers.
            own = None if sinks is None else sinks.expand(logits.shape[:-1])
            return softmax(logits, own).mean(dim=2) * (visible > 0)[..., None]

        return receive
