"""What a policy may know of a layer at a boundary."""

from __future__ import annotations

from torch import Tensor

from reasonalloc.attention.latent import LatentHeads
from reasonalloc.cache import Rows
from reasonalloc.config import CompressionConfig
from reasonalloc.core.steps import Held, Logits
from reasonalloc.policies import Candidates


def candidates_of(
    layer: int, held: Held, rows: Rows, logits: Logits, config: CompressionConfig
) -> Candidates:
    """Return the tokens among which a layer chooses.

    Args:
        layer: index of the layer in the model.
        held: its queries and counters.
        rows: its tokens, which may not be stored yet.
        logits: of its attention.
        config: window and seed.
    """
    slab, queries, seen, latent = held.slab, held.queries, held.progress.seen, held.latent
    asked = None if queries is None else queries.read(seen, slab)
    places = None if queries is None else queries.positions(seen)
    positions, bias, own_sinks = rows.gather(rows.positions).long(), None, None
    if held.bias is not None and asked is not None and places is not None:
        asked, table, own_sinks = held.bias.split(asked)
        distance = places[:, None, :, None] - positions[:, :, None]
        bias = held.bias.of(table, distance[:, :, None])
    if latent is not None and asked is not None:
        asked = latent.scored_queries(asked)
    sinks = logits.sinks
    return Candidates(
        lengths=rows.lengths,
        positions=positions,
        load_keys=lambda: _scored_keys(rows, latent),
        load_values=lambda: _scored_values(rows, latent),
        queries=asked,
        query_positions=places,
        state=None if rows.state is None else rows.gather(rows.state),
        seen=held.progress.per_sequence(slab.batch, slab.device),
        window=config.window,
        scaling=logits.scaling,
        softcap=logits.softcap,
        sinks=None if sinks is None else sinks.view(slab.kv_heads, -1),
        layer=layer,
        seed=config.seed,
        stored=(rows.keys, rows.index) if latent is None and bias is None else None,
        bias=bias,
        query_sinks=own_sinks,
    )


def _scored_keys(rows: Rows, latent: LatentHeads | None) -> Tensor:
    """[batch, kv_heads, n, dim]: the keys that policies see."""
    keys = rows.gather(rows.keys)
    return keys if latent is None else latent.scored_keys(keys)


def _scored_values(rows: Rows, latent: LatentHeads | None) -> Tensor:
    """[batch, kv_heads, n, value_dim]: the values that policies see."""
    if latent is None:
        return rows.gather(rows.values)
    return latent.scored_values(rows.gather(rows.keys))
