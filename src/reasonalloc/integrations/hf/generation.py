"""Which ``generate`` calls can run under a budget, checked before the first token."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import torch

from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.integrations.hf.budgeted import Budgeted
from reasonalloc.integrations.hf.cache import BudgetCache
from reasonalloc.integrations.hf.calls import check_attention, check_checkpointing
from reasonalloc.integrations.hf.model import check_adapter
from reasonalloc.integrations.hf.versions import cache_name, given_cache
from reasonalloc.planning.shapes import text_config

# Arguments that change how the cache is used, and what they ask for.
_REFUSED = {
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "assisted decoding (prompt lookup)",
    "assistant_early_exit": "assisted decoding (early exit)",
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa decoding",
    "constraints": "constrained beam search",
    "force_words_ids": "constrained beam search",
    "output_attentions": "returning attention weights",
    "guidance_scale": "classifier-free guidance",
    "prefill_chunk_size": "prefill in chunks, each of which would be compressed",
    "use_mtp": "multi-token prediction",
}
_BATCHING = (
    "continuous batching keeps a cache of its own, which would not be compressed: use generate() "
    "with a padded batch, or serve with vLLM (reasonalloc serve), or detach"
)
#: Ways of generating that a class of transformers has and that know no budget, and why.
NOT_HERE = {
    "generate_batch": _BATCHING,
    "init_continuous_batching": _BATCHING,
    "continuous_batching_context_manager": _BATCHING,
}


def check_generate(
    model: Any, attachment: Budgeted, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> BudgetCache:
    """Refuse what cannot work; return the cache to use: the caller's own or a new one.

    Raises:
        UnsupportedError: a generation mode that needs a cache that can go back or be reordered.
        UsageError: a foreign cache, or a prompt that does not fit.
    """
    check_attention(attachment)
    _check_state(model)
    bound = inspect.signature(type(model).generate).bind_partial(model, *args, **kwargs)
    call = {**bound.arguments, **bound.arguments.get("kwargs", {})}
    passed = call.get("generation_config")

    def given(name: str) -> Any:
        """As transformers merges them: the call, the passed configuration, the model's own."""
        for source in (call.get(name), getattr(passed, name, None)):
            if source is not None:
                return source
        return getattr(model.generation_config, name, None)

    if given("is_assistant"):
        raise UnsupportedError(
            "this model has a KV budget and cannot be the draft of another's assisted decoding, "
            "which takes tokens back: detach it"
        )
    if (given("num_beams") or 1) > 1:
        raise UnsupportedError(
            f"beam search (num_beams={given('num_beams')}) cannot run under a KV budget, since "
            "beams reorder the cache: use num_beams=1, sampling or num_return_sequences"
        )
    for name, mode in _REFUSED.items():
        if given(name) and not (name == "guidance_scale" and given(name) == 1):
            raise UnsupportedError(
                f"{mode} ({name}) cannot run under a KV budget: leave {name} out, or detach"
            )
    if given("use_cache") is False:
        raise UnsupportedError(
            "use_cache=False leaves nothing to compress: use the cache or detach"
        )
    kind = given("cache_implementation")
    if kind not in (None, "hybrid"):  # "hybrid": what Gemma checkpoints say, transformers drops it
        raise UnsupportedError(
            f"cache_implementation={kind!r} asks for another cache, which would not be compressed: "
            "leave it out, or detach"
        )
    cache = given_cache(call)
    if cache is not None and not isinstance(cache, BudgetCache):
        raise UsageError(
            f"{cache_name()} is a {type(cache).__name__}, which would not be compressed: pass a "
            "cache that this model's generate() returned while attached, or none"
        )
    if cache is not None and cache.owner is not attachment:
        raise UsageError(
            f"{cache_name()} was made under another attachment: budgets differ, so start anew"
        )
    if cache is None:
        cache = attachment.new_cache()
    with cache.in_use():
        back = _check_text(model, attachment, cache, call, given)
        if back is not None:
            cache.go_back(back)
    return cache


def _check_text(
    model: Any,
    attachment: Budgeted,
    cache: BudgetCache,
    call: dict[str, Any],
    given: Callable[[str], Any],
) -> int | None:
    """Check the prompt; the columns that the cache must go back to, or None."""
    prompt, back = _prompt_shape(call), None
    if prompt is None:
        return None
    cache.check_whole()
    if cache.get_seq_length():
        prompt, back = _continue(cache, call, prompt, int(given("num_return_sequences") or 1))
    seen = cache.get_seq_length() if back is None else back
    _check_prompt(model, attachment, seen, prompt, given)
    return back


def _check_state(model: Any) -> None:
    """Refuse a model that is not in a state to generate with a cache.

    Raises:
        UnsupportedError: gradient checkpointing in training mode, an adapter with learned tokens.
    """
    check_checkpointing(model)
    owner = getattr(model.prepare_inputs_for_generation, "__self__", model)
    if owner is not model:
        check_adapter(owner)


def _continue(
    cache: BudgetCache, call: dict[str, Any], prompt: tuple[int, int], copies: int
) -> tuple[tuple[int, int], int | None]:
    """Check that a text goes on where the cache is, or that the cache can go back to where it does.

    Returns:
        Columns of the whole text and the real tokens of its longest sequence; and the columns to go
        back to, or None.

    Raises:
        UsageError: the text ends before the cache, or differs from it where tokens were evicted.
    """
    columns, tokens = prompt
    seen, mask = cache.get_seq_length(), _mask(call)
    if mask is not None and mask.shape[1] == seen + columns:
        return (seen + columns, tokens), None  # the new turn alone, with a mask over everything
    if mask is not None and mask.shape[1] != columns:
        raise UsageError(
            f"the attention mask covers {mask.shape[1]} tokens, but {columns} are given and the "
            f"cache has seen {seen}: pass a mask over the {columns}, or over all {seen + columns} "
            "if the new turn alone is given"
        )
    ids = _ids(call)
    if ids is None:
        same = min(seen, columns)  # embeddings are not compared
    else:
        ids = ids.repeat_interleave(copies, dim=0)
        cache.check_batch(len(ids))
        visible = None if mask is None else mask.repeat_interleave(copies, dim=0)
        same = cache.seen.common(ids, visible)
    if same == seen < columns:
        return prompt, None
    if same == columns or (same == 0 and columns <= seen):
        raise UsageError(
            f"the prompt has {columns} tokens, but the cache has seen {seen}: pass the whole "
            "conversation, the new turn at its end, or the new turn alone with an attention_mask "
            "over everything, or leave the cache out"
        )
    back = cache.reach(same)
    if back is None:
        raise UsageError(
            f"input_ids differ from what the cache has seen at token {same} of {columns}, and "
            f"tokens before it may have been evicted since (at {cache.evicted_at}): leave "
            f"{cache_name()} out, or let chat(tokenizer) of the attachment keep a conversation "
            "whose template drops thoughts"
        )
    return prompt, back


def _mask(call: dict[str, Any]) -> torch.Tensor | None:
    mask = call.get("attention_mask")
    if not isinstance(mask, torch.Tensor):
        return None
    if mask.dim() != 2:
        raise UsageError(
            f"attention_mask has {mask.dim()} dimensions: generate() takes one of [batch, tokens]"
        )
    return mask


def _ids(call: dict[str, Any]) -> torch.Tensor | None:
    """Token ids of the prompt; None if there are none, or something else comes in their place."""
    for name in ("inputs", "input_ids"):
        if call.get(name) is not None:
            ids = call[name]
            known = isinstance(ids, torch.Tensor) and not ids.is_floating_point()
            return ids if known and call.get("inputs_embeds") is None else None
    return None


def _prompt_shape(call: dict[str, Any]) -> tuple[int, int] | None:
    """Columns of the prompt and the real tokens of its longest sequence."""
    prompt = call.get("inputs") if call.get("inputs") is not None else call.get("input_ids")
    if prompt is None:
        prompt = call.get("inputs_embeds")
    if not isinstance(prompt, torch.Tensor) or prompt.dim() < 2:
        return None
    columns = int(prompt.shape[1])
    mask = call.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return columns, int(mask.sum(dim=1).max())
    return columns, columns


def _check_prompt(
    model: Any,
    attachment: Budgeted,
    seen: int,
    prompt: tuple[int, int],
    given: Callable[[str], Any],
) -> None:
    columns, tokens = prompt
    config = text_config(model)
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and tokens > limit:
        raise UsageError(
            f"the prompt has {tokens} tokens, but the model has {limit} positions: shorten it"
        )
    new = given("max_new_tokens")
    end = columns + new if new else (given("max_length") or 0)
    switch = rope_switch(config)
    if switch is not None and columns <= switch < end:
        raise UnsupportedError(
            f"the rotary embedding of this model changes at {switch} tokens (longrope), where "
            f"transformers drops the cache: end before that, at most {switch - columns} new tokens"
        )
    settings = attachment.config
    if not seen or settings.pin_turns:
        settings.pinned(_new_tokens(given("attention_mask"), columns - seen) if seen else tokens)
    if settings.prompt == "protect" and not seen:
        room = int(_least_kept(attachment, attachment.totals)) - settings.window
        if tokens > room:
            need = _budget_for(attachment, tokens + settings.window)
            raised = (
                "use layers='uniform'" if need is None else f"raise the budget to at least {need}"
            )
            raise UsageError(
                f"protect_prompt: the prompt has {tokens} tokens, but the smallest layer has room "
                f"for {max(room, 0)} besides its window at budget={settings.budget}: {raised}, "
                "shorten the prompt, or do not protect it"
            )


def _new_tokens(mask: Any, columns: int) -> int:
    """Return the real tokens of the longest sequence in the last ``columns`` of a text."""
    if not isinstance(mask, torch.Tensor):
        return columns
    return int(mask[:, -columns:].sum(dim=1).max())


def _budget_for(attachment: Budgeted, least: int) -> int | None:
    """A budget at which heads of all layers keep ``least`` tokens; None if 64 times it do not do.

    With equal layers the smallest one; with unequal layers it may be a little more.
    """
    budget = attachment.config.budget
    smallest = _least_kept(attachment, attachment.totals)
    while smallest < least:
        budget = max(budget + 1, math.ceil(budget * least / smallest))
        if budget > 64 * attachment.config.budget:
            return None
        smallest = _least_kept(attachment, attachment.totals_at(budget))
    return budget


def _least_kept(attachment: Budgeted, totals: Sequence[int]) -> Fraction:
    """Tokens of a KV head in the layer where it keeps least, with these totals of layers."""
    heads = [shape.kv_heads for shape in attachment.shapes if shape.compressible]
    return min(Fraction(total, own) for total, own in zip(totals, heads, strict=True))


def rope_switch(config: Any) -> int | None:
    """Length at which a longrope model changes its rotary embedding, or None."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) != "longrope":
        return None
    switch = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    return switch if isinstance(switch, int) else None


def check_result(result: Any, cache: BudgetCache) -> None:
    """Make sure that the whole generation went through the cache.

    Raises:
        UnsupportedError: the model went on without it.
    """
    sequences = getattr(result, "sequences", result)
    if isinstance(sequences, torch.Tensor) and cache.get_seq_length() < sequences.shape[1] - 1:
        raise UnsupportedError(
            f"the model left its cache after {cache.get_seq_length()} of {sequences.shape[1]} "
            "tokens and went on uncompressed: this model cannot run under a KV budget"
        )
