"""Ends of turns: the token with which a chat template ends what the assistant says."""

from __future__ import annotations

from typing import Any

_PROBE = "reasonalloc"


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the token id with which the chat template ends an assistant's turn.

    It is the first special or added token behind the content of a rendered assistant message. None:
    no chat template, or none that marks the end.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:  # templates are programs and raise what they like
        return None
    _, found, tail = text.rpartition(_PROBE)
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"] if found and tail else []
    marks = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    marks.discard(tokenizer.unk_token_id)
    return next((int(token) for token in ids if token in marks), None)
