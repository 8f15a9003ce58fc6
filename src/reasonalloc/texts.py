"""Known texts to replay: a prompt and what follows it, as token ids."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from reasonalloc.errors import UsageError

T = TypeVar("T")


@dataclass(frozen=True)
class Trajectory:
    """A prompt and its completion.

    Attributes:
        prompt_ids: at least one token.
        completion_ids: at least two tokens, or none if it has still to be generated.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "completion_ids"):
            object.__setattr__(self, name, tuple(map(operator.index, getattr(self, name))))

    @property
    def key(self) -> str:
        """Fingerprint of the tokens: 16 hex digits."""
        text = json.dumps([self.prompt_ids, self.completion_ids])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_trajectories(path: str, tokenizer: Any, name: str = "trajectories") -> list[Trajectory]:
    """Read JSON lines: ``prompt_ids`` or ``prompt`` or ``messages``, and a completion.

    The completion is ``completion_ids`` or ``completion``; it may be missing where it is generated.
    ``name`` is what messages call the file.

    Raises:
        UsageError: an unreadable file or a bad line, with its number.
    """
    return _read(path, lambda data: _trajectory(data, tokenizer), name)


def load_kinds(path: str, name: str = "trajectories") -> list[str]:
    """The label ``kind`` of every text in such a file, "" where there is none.

    Raises:
        UsageError: as ``load_trajectories``, or a label that is no text.
    """
    return _read(path, _kind, name)


def _read(path: str, parse: Callable[[Any], T], name: str) -> list[T]:
    try:
        lines = Path(path).expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UsageError(f"{name}={path!r} cannot be read: {reason}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(parse(json.loads(line)))
            except ValueError as error:  # UsageError and JSON's own error are both
                raise UsageError(f"{name}={path!r}, line {number}: {error}") from None
    if not found:
        raise UsageError(f"{name}={path!r} holds none: write one JSON object per line")
    return found


def _kind(data: Any) -> str:
    kind = data.get("kind", "") if isinstance(data, dict) else ""
    if not isinstance(kind, str):
        raise UsageError(f"kind={kind!r} must be text")
    return kind


def _trajectory(data: Any, tokenizer: Any) -> Trajectory:
    if not isinstance(data, dict):
        raise UsageError("it must be a JSON object")
    prompt = _ids(data, "prompt", tokenizer, special=True)
    if prompt is None and isinstance(data.get("messages"), list):
        encoded = tokenizer.apply_chat_template(
            data["messages"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        prompt = tuple(int(token) for token in encoded)
    if not prompt:
        raise UsageError("it needs prompt_ids, prompt or messages")
    completion = _ids(data, "completion", tokenizer, special=False)
    if completion is not None and len(completion) < 2:
        raise UsageError("its completion must have at least two tokens")
    return Trajectory(prompt, completion or ())


def _ids(
    data: dict[str, Any], name: str, tokenizer: Any, *, special: bool
) -> tuple[int, ...] | None:
    ids = data.get(f"{name}_ids")
    if ids is not None:
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise UsageError(f"{name}_ids must be a list of token ids")
        return tuple(ids)
    text = data.get(name)
    if text is None:
        return None
    if not isinstance(text, str) or not text:
        raise UsageError(f"{name} must be text")
    return tuple(tokenizer(text, add_special_tokens=special)["input_ids"])
