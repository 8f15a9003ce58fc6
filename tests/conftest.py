"""What every test needs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import examples  # noqa: F401 (loads the profile)
import sanitized
from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.allocators.layer import LAYER_ALLOCATORS
from reasonalloc.evaluation.tasks.base import TASKS
from reasonalloc.policies import POLICIES
from tiny_folder import save_tiny

# A shell that starts pytest in the background has it, and all it starts, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


if os.environ.get("REASONALLOC_SANITIZE"):
    sanitized.prepare()


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies, allocators and tasks that a test makes known are unknown after it."""
    for registry in (POLICIES, HEAD_ALLOCATORS, LAYER_ALLOCATORS, TASKS):
        monkeypatch.setattr(registry, "_entries", registry.entries())
        monkeypatch.setattr(registry, "_objects", {})


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: exit code, what it printed, and its messages."""
    from reasonalloc.cli.main import main

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, without a chat template."""
    return save_tiny(tmp_path_factory.mktemp("model"), chat=False)
