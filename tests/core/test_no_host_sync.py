"""An event reads nothing back from the device: it runs on tensors that have no data at all."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from made_statistics import ready
from reasonalloc.allocators.head import HEAD_ALLOCATORS, HeadQuery
from reasonalloc.attention import BACKENDS
from reasonalloc.cache import Slab
from reasonalloc.core.window import QueryWindow
from reasonalloc.ops import TORCH
from reasonalloc.policies import POLICIES, Candidates
from reference import NAMED_BY_A_FILE

BATCH, HEADS, GROUP, WINDOW, N, DIM = 2, 3, 2, 4, 30, 8


def test_fake_tensors_notice_reads() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        int(torch.ones(3).max())


@pytest.mark.parametrize("heads", HEAD_ALLOCATORS.entries())
@pytest.mark.parametrize("policy", sorted(set(POLICIES.entries()) - NAMED_BY_A_FILE))
def test_event_and_decode_step(policy: str, heads: str) -> None:
    with FakeTensorMode():
        slab = Slab(
            BATCH,
            HEADS,
            HEADS * N,
            DIM,
            DIM,
            dtype=torch.float32,
            device=torch.device("cpu"),
            state_channels=2,
        )
        slab.uniform_length = N - 1
        slab.append(
            torch.ones(BATCH, HEADS, 1, DIM),
            torch.ones(BATCH, HEADS, 1, DIM),
            torch.full((BATCH,), N - 1),
            torch.ones(BATCH, 1, dtype=torch.bool),
        )
        query = torch.ones(BATCH, HEADS * GROUP, 1, DIM)
        for backend in set(BACKENDS.entries()) - {"triton"}:
            for need_weights in (False, True):
                BACKENDS.create(backend).decode(query, slab, 1.0, None, need_weights)
        window = QueryWindow(query, WINDOW)
        window.push(query, torch.full((BATCH,), N - 1), torch.ones(BATCH, 1, dtype=torch.bool))
        rows = slab.as_rows()
        made = ready(policy, 1, HEADS * GROUP, DIM, HEADS)
        if made.state_channels:
            state = torch.zeros(BATCH, HEADS * N, made.state_channels)
            received = torch.ones(BATCH, 3, HEADS * N)
            made.observe(state, received, received)
        candidates = Candidates(
            lengths=rows.lengths,
            positions=rows.gather(rows.positions).long(),
            load_keys=lambda: rows.gather(rows.keys),
            load_values=lambda: rows.gather(rows.values),
            queries=window.read(torch.full((BATCH,), N), slab),
            query_positions=window.positions(torch.full((BATCH,), N)),
            state=torch.ones(BATCH, HEADS, N, max(made.state_channels, 1)),
            seen=torch.full((BATCH,), N),
            window=WINDOW,
            scaling=1.0,
            softcap=None,
            layer=1,
            seed=0,
        )
        scores = made.score(candidates)
        total = torch.full((BATCH,), HEADS * 10)
        least = torch.full((BATCH,), WINDOW)
        query_ = HeadQuery(
            scores,
            rows.lengths,
            total,
            HEADS * 10,
            least,
            WINDOW,
            planned=torch.tensor([8, 10, 12]),
        )
        budgets = HEAD_ALLOCATORS.create(heads).allocate(query_)
        keep = TORCH.select(scores, rows.lengths, budgets, WINDOW, made.recent_fraction, scores > 0)
        slab.rewrite(rows, keep, None)
