"""Multi-head latent attention (MLA): attention to latents where they lie, and what they stand for.

A token is one vector: its latent and the rotary key that all heads share. The key of a head is a
product of the latent, followed by the rotary key; its value is another product of the latent. One
query attends without any of these: its part for the key is multiplied by the head's matrix instead,
and what it reads from the latents by that of the values (DeepSeek-V2, arXiv 2405.04434, 2.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from reasonalloc.attention.interface import Backend, SlabView


@dataclass(frozen=True, eq=False)
class LatentHeads:
    """The heads of a layer, as matrices over latents.

    Attributes:
        weight: [query_heads * (plain + value_dim), rank]: of each head the rows of its keys, the
            rotary part apart, then those of its values.
        heads: query heads.
        value_dim: width of a value.
    """

    weight: Tensor
    heads: int
    value_dim: int

    @property
    def rank(self) -> int:
        """Width of a latent."""
        return self.weight.shape[1]

    @property
    def plain(self) -> int:
        """Width of a key without its rotary part."""
        return self.weight.shape[0] // self.heads - self.value_dim

    def expand(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all heads.

        Args:
            tokens: [batch, 1, n, rank + rotary].

        Returns:
            [batch, query_heads, n, plain + rotary] and [batch, query_heads, n, value_dim].
        """
        latents, rotary = tokens.split([self.rank, tokens.shape[-1] - self.rank], dim=-1)
        batch, _, n, _ = tokens.shape
        both = F.linear(latents, self.weight.to(latents.dtype)).view(batch, n, self.heads, -1)
        keys, values = both.transpose(1, 2).split([self.plain, self.value_dim], dim=-1)
        return torch.cat([keys, rotary.expand(-1, self.heads, -1, -1)], dim=-1), values

    def absorb(self, query: Tensor) -> Tensor:
        """Return queries of keys as queries of tokens.

        Args:
            query: [batch, query_heads, q, plain + rotary].

        Returns:
            [batch, query_heads, q, rank + rotary]; products with tokens are those with their keys.
        """
        plain, rotary = query.split([self.plain, query.shape[-1] - self.plain], dim=-1)
        return torch.cat([torch.einsum("bhqp,hpr->bhqr", plain, self._keys(query)), rotary], dim=-1)

    def project(self, read: Tensor) -> Tensor:
        """Return the values of latents: attention reads a mean of these.

        Args:
            read: [batch, query_heads, q, rank].

        Returns:
            [batch, query_heads, q, value_dim].
        """
        values = self._of_heads(self.weight.to(read.dtype))[:, self.plain :]
        return torch.einsum("bhqr,hvr->bhqv", read, values)

    def decode(
        self,
        backend: Backend,
        query: Tensor,
        slab: SlabView,
        scaling: float,
        softcap: float | None,
        need_weights: bool,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to the tokens of a slab; as ``Backend.decode`` with the keys and values of all.

        Args:
            backend: reads the slab.
            query: [batch, query_heads, 1, plain + rotary].
            slab: whose keys are tokens, [batch, slots, rank + rotary].
            scaling, softcap, need_weights, sinks: see ``Backend.decode``.
        """
        out, received = backend.decode(
            self.absorb(query), _Tokens(slab), scaling, softcap, need_weights, sinks
        )
        return self.project(out[..., : self.rank]), received

    def scored_keys(self, tokens: Tensor) -> Tensor:
        """Return what policies see as keys: those of all heads side by side, in fewer numbers.

        They are rotated into the space that keys of all heads can span. So lengths, distances,
        angles and, with ``scored_queries``, attention logits are those of the keys.

        Args:
            tokens: [batch, 1, n, rank + rotary].

        Returns:
            [batch, 1, n, rank + rotary] float32.
        """
        latents, rotary = tokens.float().split([self.rank, tokens.shape[-1] - self.rank], dim=-1)
        return torch.cat([latents @ self._key_root[0], rotary * self.heads**0.5], dim=-1)

    def scored_values(self, tokens: Tensor) -> Tensor:
        """Return what policies see as values, [batch, 1, n, rank] float32: see ``scored_keys``."""
        return tokens[..., : self.rank].float() @ self._value_root[0]

    def scored_queries(self, queries: Tensor) -> Tensor:
        """Return queries of ``scored_keys``.

        Args:
            queries: [batch, 1, query_heads, window, plain + rotary].

        Returns:
            [batch, 1, query_heads, window, rank + rotary] float32.
        """
        absorbed = self.absorb(queries[:, 0].float())
        latent, rotary = absorbed.split([self.rank, absorbed.shape[-1] - self.rank], dim=-1)
        parts = [latent @ self._key_root[1], rotary / self.heads**0.5]
        return torch.cat(parts, dim=-1)[:, None]

    def _of_heads(self, weight: Tensor) -> Tensor:
        """[query_heads, plain + value_dim, rank]"""
        return weight.view(self.heads, -1, self.rank)

    def _keys(self, query: Tensor) -> Tensor:
        """[query_heads, plain, rank], in the type of a query."""
        return self._of_heads(self.weight.to(query.dtype))[:, : self.plain]

    @cached_property
    def _key_root(self) -> tuple[Tensor, Tensor]:
        return _root(self._of_heads(self.weight)[:, : self.plain])

    @cached_property
    def _value_root(self) -> tuple[Tensor, Tensor]:
        return _root(self._of_heads(self.weight)[:, self.plain :])


class _Tokens:
    """A slab of tokens as a backend reads it: the same vectors are keys and values.

    What is read of the rotary keys is of no use. It costs less than values that lie apart.
    """

    def __init__(self, slab: SlabView) -> None:
        self._slab = slab
        self.keys = self.values = slab.keys
        self.positions, self.kv_heads = slab.positions, slab.kv_heads
        self.uniform_length = slab.uniform_length

    @property
    def offsets(self) -> Tensor:
        """See ``SlabView``."""
        return self._slab.offsets

    @property
    def lengths(self) -> Tensor:
        """See ``SlabView``."""
        return self._slab.lengths

    def rows(self, flat: Tensor) -> Tensor:
        """See ``SlabView``."""
        return self._slab.rows(flat)


def _root(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the square root of ``W^T W`` and its inverse, [rank, rank] float32 each.

    A vector times the root has the length of ``W`` times the vector. What no vector can reach is
    left out of the inverse.

    Args:
        weight: [heads, dim, rank], ``W`` in parts.
    """
    rows = weight.double().flatten(0, 1)
    sizes, directions = torch.linalg.eigh(rows.T @ rows)
    least = sizes[-1] * len(sizes) * torch.finfo(sizes.dtype).eps
    reached = sizes > least
    roots = sizes.clamp_min(0).sqrt() * reached
    inverse = torch.where(reached, 1 / roots.masked_fill(~reached, 1.0), 0.0)
    root, back = ((directions * scale) @ directions.T for scale in (roots, inverse))
    return root.float(), back.float()
