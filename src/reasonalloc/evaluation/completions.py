"""Completions of prompts with the full cache, greedily, several prompts at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch

from reasonalloc.errors import UsageError
from reasonalloc.evaluation.batch import is_memory, pad_token, padded, until_end
from reasonalloc.integrations.hf.model import end_tokens
from reasonalloc.planning.shapes import text_config
from reasonalloc.texts import Trajectory
from reasonalloc.turns import end_of_turn

#: What is said of texts without an end of turn.
NO_END = (
    "no text has an end of turn, so nothing measured here says whether a model under a budget ends "
    "its turns: give chats, or let the model complete prompts (--generate N)"
)
#: Prompts that are completed together, at most.
BATCH = 8
# What a model's generation settings may ask for that looks at the prompt, and so at its padding.
_LOOKS_BACK = ("repetition_penalty", "no_repeat_ngram_size", "min_length", "sequence_bias")


def turn_ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the token ids that end a turn: the generation settings' and the chat template's."""
    end = end_of_turn(tokenizer)
    return frozenset(end_tokens(model) if end is None else [*end_tokens(model), end])


def tell_no_end(
    texts: Sequence[Trajectory], ends: frozenset[int], tell: Callable[[str], None]
) -> None:
    """Say so if no completion has an end of turn."""
    if not any(ends.intersection(text.completion_ids[1:]) for text in texts):
        tell(NO_END)


def complete(model: Any, trajectory: Trajectory, new_tokens: int) -> Trajectory:
    """Generate one completion, see ``complete_all``."""
    return complete_all(model, [trajectory], new_tokens)[0]


@torch.inference_mode()
def complete_all(
    model: Any, trajectories: Sequence[Trajectory], new_tokens: int, batch: int = BATCH
) -> list[Trajectory]:
    """Generate completions with the full cache, greedily; those that are there stay.

    Args:
        model: a transformers model, not attached to anything.
        trajectories: with or without completions.
        new_tokens: bound of generated tokens.
        batch: prompts at a time. In fp32 the tokens are those of one prompt at a time, but for
            near-ties.

    Raises:
        UsageError: more tokens than the model has positions for, a completion of a single token,
            or one prompt that does not fit into memory.
    """
    texts = list(trajectories)
    open_ = [index for index, text in enumerate(texts) if not text.completion_ids]
    _check_length(model, [len(texts[index].prompt_ids) for index in open_], new_tokens)
    for indices in _batches(model, texts, open_, batch):
        prompts = [texts[index].prompt_ids for index in indices]
        for index, tokens in zip(indices, _generate(model, prompts, new_tokens), strict=True):
            if len(tokens) < 2:
                raise UsageError(
                    "the model ended its completion at once: there is nothing to replay"
                )
            texts[index] = replace(texts[index], completion_ids=tuple(tokens))
    return texts


def _check_length(model: Any, lengths: Sequence[int], new_tokens: int) -> None:
    limit = getattr(text_config(model), "max_position_embeddings", None)
    longest = max(lengths, default=0)
    if longest and isinstance(limit, int) and longest + new_tokens > limit:
        raise UsageError(
            f"a prompt of {longest} tokens and {new_tokens} generated ones do not fit: the model "
            f"has {limit} positions: generate {max(limit - longest, 0)} or fewer"
        )


def _batches(
    model: Any, texts: Sequence[Trajectory], indices: Sequence[int], batch: int
) -> list[list[int]]:
    """Neighbours in length together: little padding, and none where it would be looked at."""

    def length(index: int) -> int:
        return len(texts[index].prompt_ids)

    settings = model.generation_config
    looks = any(getattr(settings, name, None) not in (None, 0, 1) for name in _LOOKS_BACK)
    ordered = sorted(indices, key=length)
    groups = [list(own) for _, own in groupby(ordered, key=length)] if looks else [ordered]
    return [own[i : i + batch] for own in groups for i in range(0, len(own), batch)]


def _generate(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """Tokens after each prompt, up to the end token and with it."""
    ids, mask = padded(prompts, pad_token(model), model.device)
    try:
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad_token(model),
        )
    except (RuntimeError, MemoryError) as error:
        if not is_memory(error):
            raise
        reason = " ".join(str(error).split())
    else:
        ends = end_tokens(model)
        return [until_end(row, ends) for row in out[:, ids.shape[1] :].tolist()]
    half = len(prompts) // 2  # the traceback is gone here, and the cache with it
    if not half:
        raise UsageError(
            f"a completion of {new_tokens} tokens does not fit into memory: generate fewer "
            f"({reason[:200]})"
        )
    parts = (prompts[:half], prompts[half:])
    return [tokens for part in parts for tokens in _generate(model, part, new_tokens)]


def complete_missing(
    model: Any,
    texts: list[Trajectory],
    generate: int | None,
    name: str,
    tell: Callable[[str], None],
) -> list[Trajectory]:
    """Return texts whose missing completions were generated with the full cache.

    Args:
        model: not attached to anything.
        texts: with completions or without.
        generate: tokens to generate, or None.
        name: what messages call the texts.
        tell: is told if there is nothing to generate.

    Raises:
        UsageError: completions are missing and are not to be generated.
    """
    missing = any(not text.completion_ids for text in texts)
    if generate is None:
        if missing:
            raise UsageError(
                f"{name} has prompts without a completion: give generate=N, on the command line "
                "--generate N"
            )
        return texts
    if not missing:
        tell(f"generate={generate} has no effect: all texts of {name} are complete")
        return texts
    return complete_all(model, texts, generate)
