"""Rotary position embeddings as rotations of complex numbers (half-split layout).

Dimensions ``f`` and ``f + pairs`` of a query or a key are one complex number, which a token at
position ``p`` turns by ``frequency_f * p``. Dimensions beyond ``2 * pairs`` are not rotated: each
is a number of its own, of frequency 0. All of them together are the *features* of a vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a model's layers under a budget.

    Attributes:
        frequencies: angle per position of each pair, in radians.
        scaling: factor of rotated queries and keys (1 unless the embedding rescales attention).
        head_dim: width of a query; what ``frequencies`` does not cover is not rotated.
    """

    frequencies: tuple[float, ...]
    scaling: float
    head_dim: int

    @property
    def pairs(self) -> int:
        """Rotated pairs of dimensions."""
        return len(self.frequencies)

    @property
    def features(self) -> int:
        """Complex numbers that make up a vector."""
        return self.head_dim - self.pairs

    def rates(self, device: torch.device) -> Tensor:
        """[features] float64, angle per position of each feature."""
        still = [0.0] * (self.features - self.pairs)
        return torch.tensor([*self.frequencies, *still], dtype=torch.float64, device=device)


def turns(positions: Tensor, rates: Tensor) -> Tensor:
    """complex128 [..., features]: factors that rotate tokens to ``positions`` [...].

    The angles of long texts need double precision.
    """
    angles = positions[..., None].double() * rates
    return torch.polar(torch.ones_like(angles), angles)


def to_features(vectors: Tensor, pairs: int) -> Tensor:
    """[..., head_dim] as complex64 [..., features]."""
    vectors = vectors.float()
    first, second, still = vectors.tensor_split((pairs, 2 * pairs), dim=-1)
    imaginary = torch.cat([second, torch.zeros_like(still)], dim=-1)
    return torch.complex(torch.cat([first, still], dim=-1), imaginary)


def from_features(features: Tensor, pairs: int) -> Tensor:
    """Complex [..., features] as float32 [..., head_dim]; what is not rotated loses its imaginary
    part, as it does in a product with a real number."""
    turned, still = features.tensor_split((pairs,), dim=-1)
    return torch.cat([turned.real, turned.imag, still.real], dim=-1).float()
