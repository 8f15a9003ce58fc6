from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.policies.base import POLICIES, Candidates, Policy


@POLICIES.register("knorm", source="key norm, arXiv 2406.11430")
@dataclass(frozen=True)
class KeyNorm(Policy):
    """Keys of small norm stay: minus the L2 norm of the key."""

    def score(self, candidates: Candidates) -> Tensor:
        mantissa, exponent = torch.frexp(candidates.keys.float().norm(dim=-1))
        # RoPE keeps norms, so equal tokens tie in the first layer but for rounding errors: drop
        # the last bits, and position decides instead of noise.
        return -torch.ldexp(torch.round(mantissa * (1 << 14)) / (1 << 14), exponent)
