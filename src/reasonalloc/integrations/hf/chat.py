"""A conversation with a reasoning model whose earlier thoughts are dropped."""

from __future__ import annotations

from typing import Any

import torch

from reasonalloc.errors import UsageError
from reasonalloc.integrations.hf.budgeted import Budgeted
from reasonalloc.integrations.hf.cache import BudgetCache
from reasonalloc.integrations.hf.versions import with_cache


class Chat:
    """Turns of a chat on caches under a budget; made by ``Attachment.chat``.

    Templates of reasoning models leave the thoughts of earlier turns out, so a turn is no
    continuation of what the cache saw in the one before. A chat keeps the cache of its prompt, as
    it was before the model began to think, and goes on from there: what is prefilled in a turn is
    the last answer and the new question. Two caches are held while a turn runs.

    Args:
        attachment: of the model.
        tokenizer: with a chat template.
        settings: of every ``generate`` call.

    Attributes:
        messages: the conversation so far, as ``apply_chat_template`` takes it. It may be changed
            between turns: the cache goes back as far as it can, else starts anew.
        prefilled: tokens that the latest turn had to read, its answer not counted.
    """

    def __init__(self, attachment: Budgeted, tokenizer: Any, settings: dict[str, Any]) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("this tokenizer has no chat template: give one that has")
        for name in ("past_key_values", "cache", "input_ids", "inputs", "attention_mask"):
            if name in settings:
                raise UsageError(f"{name} is the chat's own: leave it out")
        self.messages: list[dict[str, str]] = []
        self.prefilled = 0
        self._attachment = attachment
        self._tokenizer = tokenizer
        self._settings = settings
        self._prompt: BudgetCache | None = None

    def ask(self, text: str, **settings: Any) -> str:
        """Add a question, generate, and return the answer as the model wrote it, thoughts included.

        Args:
            text: of the user.
            settings: of this ``generate`` call, on top of the chat's own.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        encoded = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = encoded["input_ids"].to(self._attachment.device)
        cache = self._read(ids)
        out = self._attachment.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **with_cache({}, cache),
            **{**self._settings, **settings, "return_dict_in_generate": False},
        )
        answer = str(self._tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer

    def _read(self, ids: torch.Tensor) -> BudgetCache:
        """A cache that has seen all but the last token of the prompt; a copy of it is kept."""
        cache, last = self._prompt, ids.shape[1] - 1
        self._prompt = None  # in case that reading breaks off
        same = 0 if cache is None else min(cache.seen.common(ids, None), last)
        back = None if cache is None else cache.reach(same)
        if cache is None or back is None:
            cache, back = self._attachment.new_cache(), 0
        elif back < cache.get_seq_length():
            cache.go_back(back)
        self.prefilled = ids.shape[1] - back
        if back < last:
            self._attachment.prefill(ids[:, back:last], cache)
        self._prompt = cache
        return cache.copy()
