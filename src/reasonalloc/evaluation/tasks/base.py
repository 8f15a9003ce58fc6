"""What a task is: problems with exact answers, from the hub or a file, and a grader."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from reasonalloc.errors import UsageError
from reasonalloc.registry import Registry

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class Problem:
    """One problem.

    Attributes:
        id: what results call it; unique in its data.
        prompt: the user's message, instructions included.
        gold: the right answer.
    """

    id: str
    prompt: str
    gold: str


@dataclass(frozen=True)
class Verdict:
    """What a grader says of a completion: the answer found (None: there is none) and the mark."""

    answer: str | None
    correct: bool


@dataclass(frozen=True)
class Hub:
    """A data set on the hub: name, split, and configuration if it has several."""

    name: str
    split: str
    config: str | None = None


@dataclass(frozen=True)
class Problems:
    """The problems that were asked for, and a fingerprint of all that the data holds."""

    chosen: tuple[Problem, ...]
    hash: str


class Task(ABC):
    """Problems of one kind. A task is a frozen dataclass; its fields are parameters."""

    #: Where the problems come from without a file; None: they are generated.
    hub: ClassVar[Hub | None] = None
    #: Whether answers are marked with math-verify.
    needs_math: ClassVar[bool] = False

    @abstractmethod
    def problem(self, row: dict[str, Any], index: int) -> Problem:
        """Read one row of the data; ``index`` counts from 0.

        Raises:
            UsageError: something is missing; says what.
        """

    @abstractmethod
    def grade(self, problem: Problem, completion: str) -> Verdict:
        """Find the answer in a completion and mark it."""

    def load(self, data: str | None, limit: int | None) -> Problems:
        """The first ``limit`` problems of the data (None: all).

        Args:
            data: JSON lines; None: the hub.
            limit: at least 1.

        Raises:
            UsageError: unreadable data, with the line; two problems of one name.
        """
        if self.hub is None:
            raise UsageError("this task has no data set")
        rows = _hub_rows(self.hub) if data is None else _file_rows(data)
        where = f"data set {self.hub.name!r}" if data is None else f"data={data!r}"
        problems: list[Problem] = []
        seen: set[str] = set()
        for number, row in rows:
            try:
                problem = self.problem(row, len(problems))
            except UsageError as error:
                raise UsageError(f"{where}, line {number}: {error}") from None
            if problem.id in seen:
                raise UsageError(
                    f"{where}, line {number}: a second problem is called {problem.id!r}: give "
                    "every problem its own id"
                )
            seen.add(problem.id)
            problems.append(problem)
        if not problems:
            raise UsageError(f"{where} holds no problem: write one JSON object per line")
        return Problems(tuple(problems[:limit]), data_hash(problems))


TASKS: Registry[Task] = Registry(
    "task", "reasonalloc.evaluation.tasks", lambda: Task, "reasonalloc.tasks"
)


def data_hash(problems: list[Problem]) -> str:
    """Fingerprint of problems: 16 hex digits."""
    text = json.dumps([asdict(problem) for problem in problems])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def text_field(row: dict[str, Any], *names: str) -> str:
    """The first of these fields that is there, as text; numbers are taken as written.

    Raises:
        UsageError: none is there, or it is empty or no text.
    """
    for name in names:
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or not value.strip():
            raise UsageError(f"{name}={value!r} must be text that is not empty")
        return value.strip()
    raise UsageError(
        f"it has no {' or '.join(names)}, only {', '.join(map(str, row)) or 'nothing'}"
    )


def _file_rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = Path(path).expanduser().read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise UsageError(f"data={path!r} cannot be read: {reason}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"data={path!r}, line {number}: no valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UsageError(f"data={path!r}, line {number}: it must be a JSON object")
        yield number, row


def _hub_rows(hub: Hub) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import datasets
    except ModuleNotFoundError:
        raise UsageError(
            f"data set {hub.name!r} needs the package 'datasets': pip install 'reasonalloc[eval]', "
            "or give --data FILE"
        ) from None
    from reasonalloc.loading import hub_reachable

    offline = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = offline or not hub_reachable()
        found = datasets.load_dataset(hub.name, hub.config, split=hub.split)
    except Exception as error:  # from the network, the hub, the files
        lines = str(error).strip().splitlines() or [""]
        raise UsageError(
            f"data set {hub.name!r} cannot be loaded ({type(error).__name__}: "
            f"{lines[0].strip().rstrip('.:')}): check the network, or give --data FILE"
        ) from None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    for number, row in enumerate(found, 1):
        yield number, dict(row)
