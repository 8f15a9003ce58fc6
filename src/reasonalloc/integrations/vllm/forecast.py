"""What requests will need together from now on, as far as finished ones foretell it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from reasonalloc.integrations.vllm.admitted import Admitted
from reasonalloc.integrations.vllm.answers import Answers

_POINTS = 64  # in time
# Standard deviations above the mean. Simulated with mixed and equal answers, 6 to 73 blocks a peak:
# fewer make requests pause, more leave blocks unused.
_CAUTION = 1.5


def most_expected(
    requests: Sequence[Admitted], doubled: Sequence[int], answers: Answers, sure: float
) -> float:
    """The largest sum of blocks to be expected at any time, if nobody pauses or is new.

    A request that goes on needs more blocks until its first compression, and a constant number
    from then on. That it goes on is as likely as it was for finished ones of its length, and out
    of the question from its last token on. The oldest that go on count with their peaks, since
    these are kept for them. To the mean comes a part of the spread: sums above the pool make
    requests pause.

    Args:
        requests: at least one, of one engine; the oldest first.
        doubled: blocks of each that count for another one.
        answers: of finished requests.
        sure: blocks that are kept for peaks.
    """
    reserve = requests[0].reserve
    tokens, start, last, first, own, held, peak = np.array(
        [
            (r.tokens, r.start, r.last, r.first, r.own, reserve.held(r.start), r.peak)
            for r in requests
        ]
    ).T
    twice = np.array(doubled)[:, None]
    grows = np.maximum(np.minimum(first, last) - tokens, 0)
    most = int(grows.max())
    ahead = np.arange(0, most + 1, max(1, -(-most // _POINTS)))
    later = tokens[:, None] + ahead
    before = np.maximum(own[:, None], -(-later // reserve.block_size)) - twice
    after = held[:, None] - (twice if reserve.stays else 0)
    blocks = np.where(later < first[:, None], before, after) + reserve.windows.decodes(later)
    goes_on = answers.going_on(tokens - start + 1, ahead) * (later <= last[:, None])
    kept = np.cumsum(goes_on * peak[:, None], axis=0) <= sure
    blocks = np.where(kept, np.maximum(peak[:, None] - twice, blocks), blocks)
    mean = (blocks * goes_on).sum(axis=0)
    spread = np.sqrt((blocks**2 * goes_on * (1 - goes_on)).sum(axis=0))
    return float((mean + _CAUTION * spread).max())
