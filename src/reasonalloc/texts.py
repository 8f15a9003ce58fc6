"""Texts as token ids: prompts, and known texts to replay."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import reprlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from reasonalloc.errors import UsageError
from reasonalloc.turns import answered_chat, chat_prompt, ended

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
#: A conversation: a role and a content each.
Messages = list[dict[str, str]]
#: Fields of a line that may hold a prompt.
_PROMPTS = ("prompt", "problem", "question")


@dataclass(frozen=True)
class Trajectory:
    """A prompt and its completion.

    Attributes:
        prompt_ids: at least one token.
        completion_ids: at least two tokens, or none if it has still to be generated.

    Raises:
        UsageError: anything but whole numbers of at least 0, or of another length.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for name, wrong in (("prompt_ids", (0,)), ("completion_ids", (1,))):
            given = getattr(self, name)
            try:
                ids = tuple(map(operator.index, given))
            except (TypeError, ValueError):  # a scalar, text, fractions, rows of a batch
                ids = (-1,)
            if len(ids) in wrong or min(ids, default=0) < 0:
                raise UsageError(
                    f"{name}={reprlib.repr(given)} must be token ids of one sequence, "
                    + ("at least one" if name == "prompt_ids" else "none or at least two")
                )
            object.__setattr__(self, name, ids)

    @property
    def key(self) -> str:
        """Fingerprint of the tokens: 16 hex digits."""
        text = json.dumps([self.prompt_ids, self.completion_ids])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse what turns no text into tokens and back; None passes.

    Raises:
        UsageError: no tokenizer of transformers.
    """
    if tokenizer is None or (callable(tokenizer) and hasattr(tokenizer, "decode")):
        return
    raise UsageError(
        f"tokenizer={reprlib.repr(tokenizer)} is none: give the model's own, from "
        "AutoTokenizer.from_pretrained or reasonalloc.load_model"
    )


def check_several(texts: Any) -> None:
    """Refuse what is neither a file of texts nor several of them.

    Raises:
        UsageError: says what to give.
    """
    if not isinstance(texts, str | os.PathLike | Iterable):
        raise UsageError(f"texts={texts!r} must be a file's path or a list of texts")


def load_trajectories(path: str, tokenizer: Any, name: str = "trajectories") -> list[Trajectory]:
    """Read JSON lines: ``prompt_ids`` or ``prompt`` or ``messages``, and a completion.

    The completion is ``completion_ids``, ``completion``, or the assistant's message that ends
    ``messages``; it may be missing where it is generated. Texts get the end of their turn by the
    tokenizer's chat template, if it has one; ids stay as they are.
    ``name`` is what messages call the file.

    Raises:
        UsageError: an unreadable file or a bad line, with its number.
    """
    return _read(path, lambda data: _trajectory(data, tokenizer), name)


def load_kinds(path: str, name: str = "trajectories") -> list[str]:
    """Return the label ``kind`` of every text in such a file, "" where there is none.

    Raises:
        UsageError: as ``load_trajectories``, or a label that is no text.
    """
    return _read(path, _kind, name)


def _read(path: str, parse: Callable[[Any], T], name: str) -> list[T]:
    texts = []
    for number, line in enumerate(_lines(path, name), 1):
        if line.strip():
            try:
                texts.append(parse(_object(line)))
            except ValueError as error:  # UsageError and JSON's own error are both
                raise UsageError(f"{name}={path!r}, line {number}: {error}") from None
    if not texts:
        raise UsageError(f"{name}={path!r} holds none: write one JSON object per line")
    return texts


def _object(line: str) -> Any:
    data = json.loads(line)
    if "\\u" not in line:  # half a character is an escape
        return data
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UsageError(f"it holds {half!r}, half of a character: write it whole") from None
    return data


def _lines(path: str, name: str) -> list[str]:
    try:
        return Path(path).expanduser().read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UsageError(f"{name}={path!r} cannot be read: {reason}") from None


def _kind(data: Any) -> str:
    kind = data.get("kind", "") if isinstance(data, dict) else ""
    if not isinstance(kind, str):
        raise UsageError(f"kind={kind!r} must be text")
    return kind


def _trajectory(data: Any, tokenizer: Any) -> Trajectory:
    if not isinstance(data, dict):
        raise UsageError("it must be a JSON object")
    prompt, completion = _ids(data, "prompt"), _ids(data, "completion")
    text = _text(data, "completion") if completion is None else None
    messages = data.get("messages")
    if prompt is None and (words := _text(data, "prompt")) is not None:
        prompt = tuple(tokenizer(words, add_special_tokens=True)["input_ids"])
    elif prompt is None and isinstance(messages, list):
        before, answer = _split(messages, text, completion)
        if answer is None:
            prompt = chat_prompt(tokenizer, before)
        else:
            prompt, completion = answered_chat(tokenizer, before, answer)
    if not prompt:
        raise UsageError("it needs prompt_ids, prompt or messages")
    if completion is None and text is not None:
        completion = ended(tokenizer, text)
    if completion is not None and len(completion) < 2:
        raise UsageError("its completion must have at least two tokens")
    return Trajectory(prompt, completion or ())


def _split(
    messages: list[Any], text: str | None, completion: tuple[int, ...] | None
) -> tuple[list[Any], dict[str, Any] | None]:
    """A chat before its answer, and the answer: the given text, or its own last message."""
    if completion is not None:
        return messages, None
    if text is not None:
        return messages, {"role": "assistant", "content": text}
    last = messages[-1] if len(messages) > 1 else None
    if not isinstance(last, dict) or last.get("role") != "assistant":
        return messages, None
    return (messages[:-1], last) if isinstance(last.get("content"), str) else (messages, None)


def _ids(data: dict[str, Any], name: str) -> tuple[int, ...] | None:
    ids = data.get(f"{name}_ids")
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise UsageError(f"{name}_ids must be a list of token ids")
    return tuple(ids)


def _text(data: dict[str, Any], name: str) -> str | None:
    text = data.get(name)
    if text is not None and not isinstance(text, str):
        raise UsageError(f"{name} must be text")
    if text == "":
        raise UsageError(f"{name} is empty")
    return text


def encode_messages(tokenizer: Any, messages: Messages, use_template: bool = True) -> Tensor:
    """Return token ids of a conversation, or of its first text alone without a chat template.

    Returns:
        [1, n] int64.

    Raises:
        UsageError: the chat template refuses the conversation, or it has no tokens.
    """
    if getattr(tokenizer, "chat_template", None) and use_template:
        try:
            encoded = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except Exception as error:  # templates are programs and raise what they like
            raise UsageError(f"the model's chat template refuses this prompt: {error}") from error
    else:
        encoded = tokenizer(messages[0]["content"], return_tensors="pt")
    tokens: Tensor = encoded["input_ids"]
    if tokens.numel() == 0:
        raise UsageError("the prompt has no tokens: write a longer one")
    return tokens.long()


def load_prompts(path: str, count: int, name: str = "prompts") -> list[Messages]:
    """Read the first prompts of a JSON-lines file, as conversations.

    Args:
        path: the file; lines have one of prompt, problem, question and messages.
        count: prompts to read.
        name: what messages call the file.

    Raises:
        UsageError: the file cannot be read, or a line is no prompt; says which.
    """
    prompts: list[Messages] = []
    for number, line in enumerate(_lines(path, name), 1):
        if line.strip() and len(prompts) < count:
            where = f"{name}={path!r}, line {number}"
            try:
                data = _object(line)
            except UsageError as error:
                raise UsageError(f"{where}: {error}") from None
            except ValueError as error:
                raise UsageError(f"{where} is not valid JSON: {error}") from None
            prompts.append(as_messages(data, where))
    if not prompts:
        raise UsageError(f"{name}={path!r} holds no prompt: write one JSON object per line")
    return prompts


def as_messages(data: Any, where: str) -> Messages:
    """Return a prompt as a conversation.

    Args:
        data: text, a list of messages, or an object with prompt, problem, question or messages.
        where: what messages call it.

    Raises:
        UsageError: it is none of them, or empty.
    """
    if isinstance(data, dict):
        values = [data.get(field) for field in _PROMPTS]
        texts = [value for value in values if isinstance(value, str) and value.strip()]
        messages = data.get("messages")
        data = messages if isinstance(messages, list) and messages else "".join(texts[:1])
    if isinstance(data, list) and data:
        return list(data)
    if isinstance(data, str) and data.strip():
        return [{"role": "user", "content": data}]
    raise UsageError(f"{where} has none of prompt, problem, question and messages")


def as_trajectory(data: Any, tokenizer: Any, where: str) -> tuple[Trajectory, str]:
    """Return a text to replay and its kind.

    Args:
        data: a trajectory, text without a completion, or an object as in a JSON-lines file.
        tokenizer: turns text into tokens.
        where: what messages call it.

    Raises:
        UsageError: it is none of them; says what is wrong.
    """
    if isinstance(data, Trajectory):
        return data, ""
    if isinstance(data, str):
        data = {"prompt": data}
    try:
        return _trajectory(data, tokenizer), _kind(data)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
