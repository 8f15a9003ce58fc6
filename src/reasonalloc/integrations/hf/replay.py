"""Replay of a known text, with the full cache or with a compressed one.

The text is replayed hundreds of tokens at a time, which gives exactly what token-by-token decoding
under the same eviction gives: a layer's output for a token depends on the layer's earlier inputs
alone, so that each layer can go from boundary to boundary through all of them before the next one.
Layers that share a cache go from boundary to boundary together. Models whose Mamba layers start
anew at every call with several tokens get the completion one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reasonalloc.errors import UsageError
from reasonalloc.integrations.hf.versions import cache_of, with_cache
from reasonalloc.planning.shapes import layer_shapes, text_config
from reasonalloc.texts import Trajectory

#: Tokens that are fed at once: enough for the weights' products, few enough for their logits.
PIECE = 512


def replay_logits(model: Any, trajectory: Trajectory, cache: Any) -> Iterator[Tensor]:
    """Logits that predict the completion: prefill with the prompt, then feed it in pieces.

    Args:
        model: attached, if ``cache`` is a compressed one.
        trajectory: with at least one completion token.
        cache: an empty compressed cache, which must be ``replaying()``, or None for the full one.

    Yields:
        Logits [1, vocabulary] of the first completion token, then [PIECE, vocabulary] of others.
    """
    prompt = torch.tensor([trajectory.prompt_ids], dtype=torch.int64, device=model.device)
    fed = torch.tensor([trajectory.completion_ids[:-1]], dtype=torch.int64, device=model.device)
    out = model(prompt, **with_cache({}, cache), use_cache=True, logits_to_keep=1)
    yield out.logits[0, -1:]  # some models know no logits_to_keep
    most = PIECE if _goes_on(model) else 1
    for piece in fed.split(PIECE, dim=1):
        parts = []
        while piece.shape[1]:
            fits = most if cache is None else min(most, cache.replayable)
            out = model(piece[:, :fits], **with_cache({}, cache_of(out)), use_cache=True)
            parts.append(out.logits[0])
            piece = piece[:, fits:]
        yield parts[0] if len(parts) == 1 else torch.cat(parts)


def _goes_on(model: Any) -> bool:
    """Whether a call with several tokens goes on from the states of all layers."""
    shapes = layer_shapes(text_config(model), type(model).__name__)
    return all(shape.state is None or shape.state.continues for shape in shapes)


def check_text(model: Any, trajectory: Trajectory) -> None:
    """Refuse a text that is longer than the model's positions, or made for another vocabulary.

    Raises:
        UsageError: as said.
    """
    most = max((*trajectory.prompt_ids, *trajectory.completion_ids))
    size = model.get_input_embeddings().num_embeddings
    if most >= size:
        raise UsageError(
            f"a trajectory has the token id {most}, but the model has {size} tokens: its ids were "
            "made with another tokenizer, so give text, or ids of this model"
        )
    tokens = len(trajectory.prompt_ids) + len(trajectory.completion_ids)
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if isinstance(limit, int) and tokens > limit:
        raise UsageError(
            f"a trajectory has {tokens} tokens, but the model has {limit} positions: shorten it"
        )
