"""How far a compressed cache moves the model's predictions on a known text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reasonalloc.config import CompressionConfig
from reasonalloc.integrations.hf import attach_config
from reasonalloc.integrations.hf.replay import check_text, replay_logits
from reasonalloc.texts import Trajectory


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


def divergence(true: Tensor, ours: Tensor) -> Tensor:
    """KL(true || ours) in nats per token, of log probabilities [tokens, vocabulary]."""
    return (true.exp() * (true - ours)).sum(-1).clamp_min(0)


@torch.inference_mode()
def measure_fidelity(
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
            for reference, logits in zip(full, pieces, strict=True):
                target, targets = targets[: len(logits), None], targets[len(logits) :]
                true, ours = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
                kl.append(divergence(true, ours))
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
