"""Files that shape what ``reasonalloc eval`` measures: the arms' calibrated ones, and the code."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonalloc.calibrated import file_kind
from reasonalloc.cli import options as o
from reasonalloc.config import parse_arm
from reasonalloc.errors import UsageError
from reasonalloc.planning.files import files_missing, files_read

if TYPE_CHECKING:
    from reasonalloc.evaluation.batch import Job, Settings

_CALIBRATE = {
    "profile": "reasonalloc calibrate",
    "cost profile": "reasonalloc calibrate --objective fisher",
    "statistics": "reasonalloc calibrate --objective statistics",
}


def choose_files(arms: Sequence[str], paths: Sequence[str]) -> dict[str, str]:
    """The given files by their kind, each of which some arm reads.

    Args:
        arms: their names.
        paths: what ``--profile`` named, in any order.

    Raises:
        UsageError: an arm's file is not there, two files of one kind, or one that nothing reads.
    """
    found: dict[str, str] = {}
    for path in paths:
        kind = file_kind(path)
        if kind in found:
            raise UsageError(
                f"profile={found[kind]!r} and profile={path!r} are both a {kind}: give one of each "
                "kind, or name them in the arms, as rkv/profile(path=FILE)/uniform"
            )
        found[kind] = path
    wanted: dict[str, str] = {}
    for arm in arms:
        parsed = parse_arm(arm)
        wanted |= {} if parsed is None else dict.fromkeys(files_missing(parsed).values(), arm)
    for kind, arm in wanted.items():
        if kind not in found:
            given = f", not {' or '.join(map(repr, paths))}" if paths else ""
            raise UsageError(
                f"arm {arm!r} reads a {kind}{given}: add --profile FILE, made with "
                f"'{_CALIBRATE[kind]}'"
            )
    for kind, path in found.items():
        if kind not in wanted:
            raise UsageError(
                f"profile={path!r} is a {kind} and has no effect with arms={','.join(arms)!r}: add "
                "one that reads it (see 'reasonalloc ls'), or leave it out"
            )
    return found


def as_settings(files: dict[str, str]) -> dict[str, Any]:
    """The result of ``choose_files`` as arguments of ``Settings``."""
    return {
        "profile": files.get("profile"),
        "costs": files.get("cost profile"),
        "statistics": files.get("statistics"),
    }


def fingerprints(jobs: Sequence[Job], settings: Settings) -> dict[str, str]:
    """Of every arm that reads files, what they hold: another content is another setting."""
    found: dict[str, str] = {}
    for job in jobs:
        if job.budget is not None and job.arm not in found:
            digest = o.files_digest(files_read(settings.config(job)))
            found |= {} if digest is None else {job.arm: digest}
    return found


def code_hash() -> str:
    """Fingerprint of this package's modules: 16 hex digits. Versions change less often."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]
