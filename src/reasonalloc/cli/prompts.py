"""Prompts: reading, checking, and turning them into tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonalloc.cli import output
from reasonalloc.errors import UsageError
from reasonalloc.texts import Messages, encode_messages

if TYPE_CHECKING:
    import torch


def read_messages(prompt: str | None, prompt_file: str | None, chat: str | None) -> Messages:
    """Return the one prompt that was given, as a conversation.

    Raises:
        UsageError: none, or several, or one that cannot be read.
    """
    options = {"--prompt": prompt, "--prompt-file": prompt_file, "--chat": chat}
    given = [name for name, value in options.items() if value is not None]
    if not given:
        raise UsageError("no prompt: give --prompt TEXT, --prompt-file FILE or --chat FILE")
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} are both given: give one of them")
    if chat is not None:
        return _conversation(chat, _read("--chat", chat))
    text = prompt if prompt_file is None else _read("--prompt-file", prompt_file)
    if text is None or not text.strip():
        raise UsageError(f"{given[0]} is empty: write a prompt")
    return [{"role": "user", "content": text}]


def _read(option: str, path: str) -> str:
    try:
        return sys.stdin.read() if path == "-" else Path(path).expanduser().read_text("utf-8")
    except OSError as error:
        raise UsageError(f"{option}={path!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{option}={path!r} is no UTF-8 text: give a text file") from None


def _conversation(path: str, text: str) -> Messages:
    wanted = 'give a list such as [{"role": "user", "content": "Hello"}]'
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UsageError(f"--chat={path!r} is not valid JSON ({error}): {wanted}") from None
    if not isinstance(data, list) or not data:
        raise UsageError(f"--chat={path!r} is no list of messages: {wanted}")
    for index, message in enumerate(data):
        right = isinstance(message, dict) and set(message) == {"role", "content"}
        if not right or not all(isinstance(v, str) for v in message.values()):
            raise UsageError(
                f"--chat={path!r}: message {index} must have the texts role and content and "
                f"nothing else: {wanted}"
            )
    return data


def encode(tokenizer: Any, messages: Messages, is_chat: bool, use_template: bool) -> torch.Tensor:
    """Return token ids [1, n] of a conversation, or of its text alone without a chat template.

    Raises:
        UsageError: a conversation without a chat template, or one that the template refuses.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if is_chat and not (has_template and use_template):
        reason = "--no-chat-template was given" if has_template else "this model has none"
        raise UsageError(f"--chat needs a chat template, but {reason}: use --prompt")
    return encode_messages(tokenizer, messages, use_template)


def fit_length(config: Any, prompt_tokens: int, max_new_tokens: int) -> int:
    """Return how many new tokens fit the model's positions; say so if not all that were asked for.

    Raises:
        UsageError: the prompt alone does not fit.
    """
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return max_new_tokens
    room = limit - prompt_tokens
    if room < 1:
        raise UsageError(
            f"the prompt has {prompt_tokens} tokens, but the model has {limit} positions: shorten "
            "it"
        )
    if room < max_new_tokens:
        output.note(
            f"--max-new-tokens is cut from {max_new_tokens} to {room}: the model has {limit} "
            f"positions and the prompt takes {prompt_tokens}"
        )
    return min(room, max_new_tokens)
