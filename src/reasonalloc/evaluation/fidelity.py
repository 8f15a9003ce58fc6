"""How far a compressed cache moves the model's predictions on a known text.

The text is replayed hundreds of tokens at a time, which gives exactly what token-by-token decoding
under the same eviction gives: a layer's output for a token depends on the layer's earlier inputs
alone, so that each layer can go from boundary to boundary through all of them before the next one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reasonalloc.config import CompressionConfig
from reasonalloc.errors import UsageError
from reasonalloc.integrations.hf import attach_config
from reasonalloc.integrations.hf.versions import cache_of, with_cache
from reasonalloc.planning.shapes import text_config
from reasonalloc.texts import Trajectory

#: Tokens that are fed at once: enough for the weights' products, few enough for their logits.
PIECE = 512


@dataclass(frozen=True)
class Fidelity:
    """One arm on one trajectory; lists have one entry per predicted completion token.

    The first completion token is left out: it is predicted by the prompt alone, before anything
    can have been evicted.

    Attributes:
        kl: KL(full || compressed) of the next-token distribution, in nats.
        agree: whether both find the same token most likely.
        added_nll: how much less likely the true token became, in nats.
        kv_bytes: bytes of keys and values at the end; full_bytes: of the full cache.
        compressions: compressed layers, over all events.
    """

    kl: list[float]
    agree: list[bool]
    added_nll: list[float]
    kv_bytes: int
    full_bytes: int
    compressions: int


@torch.inference_mode()
def full_logits(model: Any, trajectory: Trajectory) -> list[Tensor]:
    """Logits of the full cache for every completion token but the first, in pieces.

    Returns:
        Tensors [PIECE, vocabulary] in the model's dtype; the last may be shorter.
    """
    check_text(model, trajectory)
    return list(replay_logits(model, trajectory, None))[1:]


@torch.inference_mode()
def fidelity(
    model: Any, trajectory: Trajectory, full: list[Tensor], config: CompressionConfig
) -> Fidelity:
    """Replay a trajectory under a budget and compare with the full cache.

    Args:
        model: a decoder-only transformers model, not attached to anything.
        trajectory: what to replay.
        full: from ``full_logits``.
        config: arm, budget and cadence.

    Raises:
        UsageError: a text longer than the model's positions, or settings that cannot work.
    """
    kl: list[Tensor] = []
    agree: list[Tensor] = []
    added: list[Tensor] = []
    targets = torch.tensor(trajectory.completion_ids[1:], dtype=torch.int64, device=model.device)
    with attach_config(model, config) as attached:
        cache = attached.new_cache()
        with cache.replaying():
            pieces = replay_logits(model, trajectory, cache)
            next(pieces)  # the first token is predicted by the prompt alone
            for reference, found in zip(full, pieces, strict=True):
                target, targets = targets[: len(found), None], targets[len(found) :]
                true, ours = reference.float().log_softmax(-1), found.float().log_softmax(-1)
                kl.append((true.exp() * (true - ours)).sum(-1).clamp_min(0))
                agree.append(true.argmax(-1) == ours.argmax(-1))
                added.append((true.gather(1, target) - ours.gather(1, target)).squeeze(1))
        return Fidelity(
            kl=torch.cat(kl).tolist(),
            agree=torch.cat(agree).tolist(),
            added_nll=torch.cat(added).tolist(),
            kv_bytes=cache.kv_bytes,
            full_bytes=attached.plan().full_bytes(cache.get_seq_length()),
            compressions=cache.recorder.compressions,
        )


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
    yield out.logits[0]
    for start in range(0, fed.shape[1], PIECE):
        piece = fed[:, start : start + PIECE]
        out = model(piece, **with_cache({}, cache_of(out)), use_cache=True)
        yield out.logits[0]


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
