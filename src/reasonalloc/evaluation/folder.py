"""The folder of a run: samples and events that survive a kill, used by one process at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from reasonalloc.errors import UsageError
from reasonalloc.evaluation.batch import Job
from reasonalloc.evaluation.endings import went_on
from reasonalloc.evaluation.kv_share import SIZES
from reasonalloc.evaluation.records import ResultFile, append_lines
from reasonalloc.evaluation.samples import OLD_DECODING
from reasonalloc.files import lock, replacing

SAMPLES, EVENTS, LOCK = "samples.jsonl", "events.jsonl", ".lock"
#: A sample: arm, budget, problem, number.
Key = tuple[str, int | str | None, str, int]
_KEPT = (
    "arm",
    "budget",
    "problem",
    "sample",
    "completion_tokens",
    "finish",
    "correct",
    "compressions",
    "prompt_tokens",
    "kv_bytes",
)


class RunFolder:
    """Results of a run in ``samples.jsonl`` and ``events.jsonl``; a context manager.

    Args:
        path: the folder; made if it is not there.

    Raises:
        UsageError: it cannot be used, or another process uses it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._samples: ResultFile | None = None
        if path.exists() and not path.is_dir():
            raise UsageError(f"out={str(path)!r} is no folder: name one, old or new")
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(
                path / LOCK,
                f"out={str(path)!r} is being written by another run: wait for it, or give another "
                "folder",
            )
        except OSError as error:
            raise UsageError(f"out={str(path)!r} cannot be used: {error.strerror}") from None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._lock)  # a kill closes it as well

    def open(self, manifest: dict[str, Any]) -> None:
        """Read what is there, drop what a kill cut off.

        Raises:
            UsageError: the files are broken, or made with other settings; names the difference.
        """
        old = {"decoding": OLD_DECODING} if "decoding" in manifest else {}
        self._samples = ResultFile(
            self.path / SAMPLES,
            manifest,
            keep=_kept,
            grows=("arm_files",),
            free=("code", "decoding", "profiles", "samples"),
            absent=old,
        )
        self._trim_events()

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What the table needs of every sample."""
        return [] if self._samples is None else self._samples.rows

    def done(self) -> set[Key]:
        """The samples that are there."""
        return {key_of(row) for row in self.rows}

    def read_again(self) -> set[Key]:
        """The samples that are on disk, after an interruption."""
        if self._samples is not None:
            self._samples.read_again()
        return self.done()

    def add(self, rows: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
        """Add the samples of one batch, and what was recorded in it.

        Raises:
            UsageError: the disk is full, or the files cannot be written; nothing was written then.
        """
        if self._samples is None:
            raise RuntimeError("the folder was not opened")
        # Events first: without their sample they are dropped when the run goes on.
        if events:
            append_lines(self.path / EVENTS, events)
        self._samples.add(*rows)

    def _trim_events(self) -> None:
        path = self.path / EVENTS
        if not path.exists():
            return
        done, kept, dropped = self.done(), [], False
        try:
            with path.open("rb") as file:
                for line in file:
                    whole = line.endswith(b"\n") and key_of(json.loads(line)) in done
                    dropped = dropped or not whole
                    if whole:
                        kept.append(line)
            if dropped:
                with replacing(path) as partial:
                    partial.write_bytes(b"".join(kept))
        except OSError as error:
            raise UsageError(f"out={str(path)!r} cannot be used: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"out={str(path)!r} is no file of events ({error}): move it away"
            ) from None


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """What the table needs of a sample, without its texts."""
    kept = {name: row[name] for name in _KEPT} | {name: row.get(name) for name in SIZES}
    return kept | {"went_on": went_on(row.get("completion"), row["completion_tokens"])}


def key_of(row: dict[str, Any]) -> Key:
    """Which sample a row is of."""
    return row["arm"], row["budget"], row["problem"], row["sample"]


def key(job: Job, problem: str, sample: int) -> Key:
    """The key of a sample that is to be taken."""
    return job.arm, job.budget, problem, sample
