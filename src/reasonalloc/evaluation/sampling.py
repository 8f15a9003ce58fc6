"""Sampling that depends on nothing but the row: the same tokens alone, in any batch, anywhere."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor

from reasonalloc.errors import UsageError
from reasonalloc.temperature import check_temperature, check_top_p
from reasonalloc.whole import whole_number


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: share of probability that is sampled from, in (0, 1].
        top_k: number of most likely tokens that are sampled from; 0: all.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise UsageError(f"{name}={value!r} must be a number")
        check_temperature(self.temperature)
        check_top_p(self.top_p)
        object.__setattr__(self, "top_k", whole_number("top_k", self.top_k))
        if self.top_k < 0:
            raise UsageError(f"top_k={self.top_k} must be 0 (all tokens) or more")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken."""
        return self.temperature == 0


def sample_seed(seed: int, problem: str, sample: int) -> int:
    """Seed of one sample of one problem, the same for every arm and budget; 48 bits."""
    text = f"{seed}/{sample}/{problem}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


class SeededSampling(LogitsProcessor):
    """Chooses each row's token by one uniform number per step from the row's own stream.

    For ``generate(do_sample=False)``: all scores but the chosen one become -inf. The number picks a
    token by the inverse of the distribution function over the vocabulary in its own order, so that
    differences of rounding between batches move a choice only where it lies on an edge. Temperature
    first, then top-k, then top-p, as transformers orders them.

    Args:
        sampling: with a temperature above 0.
        seeds: one per row.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        if sampling.greedy:
            raise ValueError("temperature 0 has nothing to sample")
        self._sampling = sampling
        # random() gives the same numbers for a seed in every version of Python.
        self._streams = [random.Random(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [batch, vocabulary] with one finite entry per row."""
        wide = torch.float32 if scores.device.type == "mps" else torch.float64
        probabilities = (scores.to(wide) / self._sampling.temperature).softmax(dim=-1)
        probabilities = self._nucleus(probabilities)
        below = probabilities.cumsum(dim=-1)
        below = below / below[:, -1:]
        draws = torch.tensor([[s.random()] for s in self._streams], dtype=wide, device="cpu")
        chosen = torch.searchsorted(below, draws.to(scores.device), right=True)
        # A float32 draw may round up to 1: the last token that has any probability.
        chosen = torch.minimum(chosen, torch.searchsorted(below, below[:, -1:].contiguous()))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def _nucleus(self, probabilities: Tensor) -> Tensor:
        """The probabilities with 0 for what top-k and top-p leave out; not normalised again."""
        top_p, top_k = self._sampling.top_p, self._sampling.top_k
        if top_p == 1 and top_k in range(1, probabilities.shape[-1]):
            least = probabilities.topk(top_k).values[:, -1:]
            return probabilities.masked_fill(probabilities < least, 0)
        if top_p == 1:
            return probabilities
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        if top_k:
            ordered[:, top_k:] = 0
        before = ordered.cumsum(dim=-1) - ordered
        left_out = before >= top_p * ordered.sum(dim=-1, keepdim=True)
        return torch.zeros_like(ordered).scatter_(1, order, ordered.masked_fill(left_out, 0))
