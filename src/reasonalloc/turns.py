"""Chats as token ids, with the end-of-turn token behind what the assistant says."""

from __future__ import annotations

from typing import Any

from reasonalloc.errors import UsageError

_PROBE, _THOUGHT = "reasonalloc", "<think>"


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


def chat_prompt(tokenizer: Any, messages: list[Any]) -> tuple[int, ...]:
    """Return token ids of a chat up to where the assistant's next turn begins.

    Raises:
        UsageError: the template refuses the chat.
    """
    return _ids(tokenizer, messages, True)


def ended(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Return token ids of a completion's text, with the end of its turn if the template has one."""
    return _ended(tokenizer, text, end_of_turn(tokenizer))


def answered_chat(
    tokenizer: Any, messages: list[Any], answer: dict[str, Any]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return token ids of a chat's prompt and of its answer, with the end of the answer's turn.

    The template renders the answer as the assistant's message; what follows the prompt is the
    completion, up to the last end-of-turn token, which is where a model stops. If the template
    has no such token, drops a part of the answer (thoughts) or begins it otherwise than the prompt
    ends, the completion is the answer's own text, with the end-of-turn token if there is one.

    Args:
        tokenizer: with a chat template.
        messages: before the answer, at least one.
        answer: a message of the assistant.

    Raises:
        UsageError: the template refuses the chat, or drops a part of the answer that is no content.
    """
    prompt, end = chat_prompt(tokenizer, messages), end_of_turn(tokenizer)
    answer = {**answer, "content": _without_end(tokenizer, answer["content"], end)}
    if end is not None:
        ids = _ids(tokenizer, [*messages, answer], False)
        head, whole = (
            _render(tokenizer, chat, tokenize=False, add_generation_prompt=begun)
            for chat, begun in ((messages, True), ([*messages, answer], False))
        )
        rest = ids[len(prompt) :]
        kept = whole.startswith(head) and _reaches(whole, answer, len(head))
        if kept and ids[: len(prompt)] == prompt and end in rest:
            return prompt, rest[: len(rest) - rest[::-1].index(end)]
        answer["content"] = _without_begin(head, answer["content"])
    if others := answer.keys() - {"role", "content"}:
        raise UsageError(
            f"the chat template drops {', '.join(sorted(others))} of the last message: "
            "write all of it as content or as completion"
        )
    return prompt, _ended(tokenizer, answer["content"], end)


def _ended(tokenizer: Any, text: str, end: int | None) -> tuple[int, ...]:
    own = _without_end(tokenizer, text, end)
    ids = tuple(tokenizer(own, add_special_tokens=False)["input_ids"])
    return ids if end is None else (*ids, end)


def _render(tokenizer: Any, messages: list[Any], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # templates are programs and raise what they like
        raise UsageError(f"the model's chat template refuses this chat: {error}") from error


def _ids(tokenizer: Any, messages: list[Any], begun: bool) -> tuple[int, ...]:
    encoded = _render(tokenizer, messages, add_generation_prompt=begun, return_dict=True)
    return tuple(int(token) for token in encoded["input_ids"])


def _reaches(whole: str, answer: dict[str, Any], head: int) -> bool:
    """Whether every text of an answer is in a rendered chat, and ends behind its head."""
    texts = [
        text.strip() for key, text in answer.items() if key != "role" and isinstance(text, str)
    ]
    return all(whole.rfind(text) >= 0 and whole.rfind(text) + len(text) > head for text in texts)


def _without_end(tokenizer: Any, text: str, end: int | None) -> str:
    """A text without the end-of-turn token that it may bring along."""
    mark = None if end is None else tokenizer.convert_ids_to_tokens(end)
    stripped = text.rstrip()
    return stripped.removesuffix(mark) if mark and stripped.endswith(mark) else text


def _without_begin(head: str, text: str) -> str:
    """An answer without the ``<think>`` with which its prompt ends already."""
    begin = head[head.rfind(_THOUGHT) :] if head.rstrip().endswith(_THOUGHT) else ""
    if not begin or not text.startswith(_THOUGHT):
        return text
    return text.removeprefix(begin if text.startswith(begin) else _THOUGHT)
