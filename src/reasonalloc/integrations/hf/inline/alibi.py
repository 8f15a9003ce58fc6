"""Biases of positions (ALiBi) as channels of queries and keys: no kernel has to know of them.

A key gets numbers that say where it stands, a query what its head makes of them, and their product
is the bias. Numbers of keys are made small, those of queries large, by the same power of two: so
policies that compare keys, or take their norm, see next to nothing of them. One more channel takes
the bias of the query's own position away, which changes no softmax: logits of recent keys are small
then, so that half precision does not round their differences away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_PART = 256  # positions are split into multiples of it and the rest: both exact in bfloat16
_UNITS = {torch.float16: 2.0**-10}  # others would go beyond what the type can hold
_UNIT = 2.0**-20
_SHIFTS = {torch.float16: 2.0**-3}  # the same of the channel that takes the query's bias away


class Bias(Protocol):
    """A bias of keys by their position, per query head."""

    def folded(
        self, query: Tensor, key: Tensor, positions: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Return query and key with more channels, whose product times ``scaling`` has the bias.

        Args:
            query, key: [batch, heads, q, head_dim].
            positions: [batch or 1, q] int64: where the keys stand.
            scaling: of the attention logits.
        """
        ...


@dataclass(frozen=True)
class RoundedBias:
    """A bias that the model rounds, and so depends on head and position: keys hold it.

    Attributes:
        slopes: [heads] float32.
        product: type that slopes and their products with positions are rounded to; None: that of
            the keys.
        factor: of the bias in the attention logits; None: ``scaling``.
    """

    slopes: Tensor
    product: torch.dtype | None
    factor: float | None

    def folded(
        self, query: Tensor, key: Tensor, positions: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """See ``Bias``; three channels."""
        unit = _UNITS.get(key.dtype, _UNIT)
        slopes = self.slopes.to(key.device)
        if self.product is not None:
            slopes = slopes.to(self.product)
        bias = (slopes[:, None] * positions.clamp_min(0)[:, None]).to(key.dtype)[..., None]
        factor = 1.0 if self.factor is None else self.factor / scaling
        whole = torch.full((1, 1, 1, 1), factor / unit, dtype=torch.float32, device=query.device)
        numbers = (bias * unit).expand(-1, -1, -1, 2)
        return _joined(query, key, _parts(whole, query.dtype), numbers, bias.float() * factor)


@dataclass(frozen=True)
class ExactBias:
    """A bias that the model does not round: keys hold their position, queries the slope.

    Attributes:
        slopes: [heads] float32.
    """

    slopes: Tensor

    def folded(
        self, query: Tensor, key: Tensor, positions: Tensor, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """See ``Bias``; five channels."""
        unit = _UNITS.get(key.dtype, _UNIT)
        place = positions.clamp_min(0)[:, None]
        rest = place % _PART
        parts = torch.stack([place - rest, rest], dim=-1).to(key.dtype) * unit
        slopes = self.slopes.to(query.device)[None, :, None, None] / scaling
        of_queries = _parts(slopes / unit, query.dtype).repeat_interleave(2, dim=-1)
        return _joined(query, key, of_queries, parts.repeat(1, 1, 1, 2), slopes * place[..., None])


def _parts(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., 2] of [..., 1]: numbers in a type, and what they lack."""
    whole = numbers.to(dtype)
    return torch.cat([whole, (numbers - whole.float()).to(dtype)], dim=-1)


def _joined(
    query: Tensor, key: Tensor, of_queries: Tensor, of_keys: Tensor, own: Tensor
) -> tuple[Tensor, Tensor]:
    """Append channels.

    Args:
        query, key: [batch, heads, q, head_dim].
        of_queries, of_keys: [batch or 1, heads or 1, q or 1, c].
        own: [batch or 1, heads, q, 1] float32: the bias of each query's position, by ``scaling``.
    """
    unit = _SHIFTS.get(key.dtype, _UNIT)
    most = min(torch.finfo(query.dtype).max, torch.finfo(own.dtype).max)
    shift = (-own / unit).clamp(-most, most).to(query.dtype)
    ones = torch.full_like(key[..., :1], unit)
    long = [query, *(one.expand(*query.shape[:3], -1) for one in (of_queries, shift))]
    return torch.cat(long, dim=-1), torch.cat([key, of_keys.expand(*key.shape[:3], -1), ones], -1)


def slopes_of_powers(heads: int) -> Tensor:
    """[heads] float32: slopes as in Bloom and Falcon.

    A geometric sequence for the largest power of two; heads beyond it get every second slope of the
    sequence that is twice as long.
    """
    power = 2 ** int(math.log2(heads))
    every = torch.arange(1, power + 1, dtype=torch.int32, device="cpu")
    slopes = torch.pow(_first(power), every)
    if power < heads:
        odd = torch.arange(1, 2 * (heads - power), 2, dtype=torch.int32, device="cpu")
        slopes = torch.cat([slopes, torch.pow(_first(2 * power), odd)])
    return slopes


def _first(heads: int) -> Tensor:
    return torch.full((), 2.0 ** (-8.0 / heads), dtype=torch.float32, device="cpu")


def slopes_up_to(heads: int, largest: float) -> Tensor:
    """[heads] float32: slopes as in MPT, ``largest`` being the exponent of the last one."""
    power = 2 ** math.ceil(math.log2(heads))
    exponents = torch.arange(1, power + 1, device="cpu").float() * (largest / power)
    slopes = 1.0 / torch.pow(2, exponents)
    return torch.cat([slopes[1::2], slopes[::2]])[:heads] if power != heads else slopes
