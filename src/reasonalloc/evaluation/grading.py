"""Answers in ``\\boxed{}`` and their comparison with math-verify, from any thread or worker."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path

from reasonalloc.errors import UsageError

_BOX = re.compile(r"\\boxed\s*\{")
_BRACES = re.compile(r"(\\boxed\s*\{)|\\.|([{}])", re.DOTALL)  # an escaped brace is text
#: Seconds for one comparison; math-verify gives up after 5 for each of its three parts.
_TIMEOUT = 20.0
_START_TIMEOUT = 120.0


def last_box(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` whose braces are balanced; None if there is none.

    A last box that was cut off (the completion reached its limit) is no answer, and neither is an
    earlier one then.
    """
    last = None
    for match in _BOX.finditer(text):
        last = match
    if last is None:
        return None
    depth, index = 1, last.end()
    while index < len(text):
        char = text[index]
        if char == "\\":  # an escaped brace is text
            index += 2
            continue
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[last.end() : index].strip() or None
        index += 1
    return None


def first_box_end(text: str, start: int = 0) -> int | None:
    """Where the first ``\\boxed{...}`` ends that is whole and not empty; None if there is none."""
    opened: list[int | None] = []  # contents of boxes begin there; None: another brace
    for part in _BRACES.finditer(text, start):
        if part[1]:
            opened.append(part.end())
        elif part[2] == "{":
            opened.append(None)
        elif part[2] and opened:
            begin = opened.pop()
            if begin is not None and text[begin : part.start()].strip():
                return part.end()
    return None


def require_math() -> None:
    """Make sure that answers can be compared.

    Raises:
        UsageError: the package is not installed.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise UsageError("grading needs the package 'math-verify': pip install 'reasonalloc[eval]'")


class MathGrader:
    """Compares answers in a process of its own, which is ended if it takes too long.

    Args:
        timeout: seconds for one comparison.
    """

    def __init__(self, timeout: float = _TIMEOUT) -> None:
        require_math()
        self._timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._owner = os.getpid()
        self.given_up = 0

    def start(self) -> None:
        """Start the process, which takes a second to load; done by the first comparison else."""
        path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "reasonalloc.evaluation.math_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for us
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        )
        self._lines = queue.SimpleQueue()
        threading.Thread(
            target=_read, args=(self._process, self._lines), daemon=True, name="grader"
        ).start()
        if self._ask("1", "1", _START_TIMEOUT) is not True:
            self.close()
            raise UsageError(
                "math-verify does not work here (1 is not 1): pip install -U 'reasonalloc[eval]'"
            )

    def equal(self, gold: str, answer: str) -> bool:
        """Whether an answer is the right one; False if that cannot be found out in time."""
        if gold.strip() == answer.strip():
            return True
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._owner = os.getpid()
                self.start()
            equal = self._ask(gold, answer, self._timeout)
            if equal is None:
                self.given_up += 1
                self.close()
            return equal is True

    def _ask(self, gold: str, answer: str, timeout: float) -> bool | None:
        process = self._process
        if process is None or process.stdin is None:
            return None
        try:
            process.stdin.write(json.dumps([gold, answer]) + "\n")
            process.stdin.flush()
            line = self._lines.get(timeout=timeout)
        except (OSError, queue.Empty):
            return None
        return bool(json.loads(line)) if line else None

    def close(self) -> None:
        """End the process; the next comparison starts another one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    """Pass on what the process says; an empty line: it is gone."""
    if process.stdout is not None:
        with process.stdout:
            for line in process.stdout:
                lines.put(line)
    lines.put("")


@functools.cache
def math_grader() -> MathGrader:
    """The one grader of this process."""
    grader = MathGrader()
    atexit.register(grader.close)
    return grader
