"""How a benchmark is run: named presets, and what a user puts in their place."""

from __future__ import annotations

from dataclasses import dataclass, replace

from reasonalloc.errors import UsageError, unknown_name
from reasonalloc.evaluation.sampling import Sampling
from reasonalloc.temperature import check_effect
from reasonalloc.whole import whole_number


@dataclass(frozen=True)
class Rules:
    """How samples are taken.

    Attributes:
        sampling: how tokens are chosen.
        samples: per problem.
        max_new_tokens: bound of generated tokens.
    """

    sampling: Sampling
    samples: int
    max_new_tokens: int

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 1))
        if self.sampling.greedy and self.samples > 1:
            raise UsageError(
                f"samples={self.samples} with temperature 0 would be the same text each time: give "
                "1 sample, or a temperature"
            )


PROTOCOLS = {
    "paper": Rules(Sampling(0.6, 0.95), 8, 16384),  # ReasonAlloc's and R-KV's
    "greedy": Rules(Sampling(), 1, 16384),
    "quick": Rules(Sampling(), 1, 1024),
}


def find_rules(
    protocol: str,
    samples: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
) -> Rules:
    """A protocol with what is not None in its place.

    Raises:
        UsageError: an unknown protocol, or values that make no sense.
    """
    if not isinstance(protocol, str) or protocol not in PROTOCOLS:
        raise unknown_name("protocol", str(protocol), PROTOCOLS)
    rules = PROTOCOLS[protocol]
    old = rules.sampling
    sampling = replace(
        old,
        temperature=old.temperature if temperature is None else temperature,
        top_p=old.top_p if top_p is None else top_p,
        top_k=old.top_k if top_k is None else top_k,
    )
    check_effect(sampling.temperature, top_p, top_k)
    return replace(
        rules,
        sampling=sampling,
        samples=rules.samples if samples is None else samples,
        max_new_tokens=rules.max_new_tokens if max_new_tokens is None else max_new_tokens,
    )
