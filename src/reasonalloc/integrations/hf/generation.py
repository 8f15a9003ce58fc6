"""Which ``generate`` calls can run under a budget, checked before the first token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.integrations.hf.cache import BudgetCache
from reasonalloc.integrations.hf.model import text_config

if TYPE_CHECKING:
    from reasonalloc.integrations.hf.attach import Attachment

# Arguments that change how the cache is used, and what they ask for.
_REFUSED = {
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "assisted decoding (prompt lookup)",
    "assistant_early_exit": "assisted decoding (early exit)",
    "penalty_alpha": "contrastive search",
    "dola_layers": "DoLa decoding",
    "constraints": "constrained beam search",
    "force_words_ids": "constrained beam search",
    "cache_implementation": "another cache implementation",
    "output_attentions": "returning attention weights",
    "negative_prompt_ids": "classifier-free guidance",
}


def check_generate(
    model: Any, attachment: Attachment, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> BudgetCache:
    """Refuse what cannot work; return the cache to use: the caller's own or a new one.

    Raises:
        UnsupportedError: a generation mode that needs a cache that can go back or be reordered.
        UsageError: a foreign cache, or a prompt that does not fit.
    """
    settings = kwargs.get("generation_config") or model.generation_config

    def given(name: str) -> Any:
        value = kwargs.get(name)
        return getattr(settings, name, None) if value is None else value

    if (given("num_beams") or 1) > 1:
        raise UnsupportedError(
            f"beam search (num_beams={given('num_beams')}) cannot run under a KV budget, since "
            "beams reorder the cache: use num_beams=1, sampling or num_return_sequences"
        )
    for name, mode in _REFUSED.items():
        if given(name):
            raise UnsupportedError(
                f"{mode} ({name}) cannot run under a KV budget: leave {name} out, or detach"
            )
    if given("use_cache") is False:
        raise UnsupportedError(
            "use_cache=False leaves nothing to compress: use the cache or detach"
        )
    cache = kwargs.get("past_key_values")
    if cache is not None and not isinstance(cache, BudgetCache):
        raise UsageError(
            f"past_key_values is a {type(cache).__name__}, which would not be compressed: pass a "
            "cache that this model's generate() returned while attached, or none"
        )
    if cache is not None and cache.owner is not attachment:
        raise UsageError(
            "past_key_values was made under another attachment: budgets differ, so start anew"
        )
    _check_prompt(model, attachment, cache, args, kwargs)
    return cache if cache is not None else attachment.new_cache()


def _check_prompt(
    model: Any,
    attachment: Attachment,
    cache: BudgetCache | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    prompt = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    if prompt is None:
        prompt = kwargs.get("inputs_embeds")
    if not isinstance(prompt, torch.Tensor) or prompt.dim() < 2:
        return
    columns = int(prompt.shape[1])
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if isinstance(limit, int) and columns > limit:
        raise UsageError(
            f"the prompt has {columns} tokens, but the model has {limit} positions: shorten it"
        )
    config = attachment.config
    if config.protect_prompt and (cache is None or cache.get_seq_length() == 0):
        shape = next(s for s in attachment.shapes if s.compressible)
        room = min(attachment.totals) // shape.kv_heads - config.window
        if columns > room:
            raise UsageError(
                f"protect_prompt: the prompt has {columns} tokens, but the smallest layer has room "
                f"for {max(room, 0)} besides its window at budget={config.budget}: raise the "
                f"budget to at least {columns + config.window}, shorten the prompt, or do not "
                "protect it"
            )
