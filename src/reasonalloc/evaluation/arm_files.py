"""Which calibrated file an arm reads, and what it holds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonalloc.calibrated import file_kind
from reasonalloc.calibrated.shipped import find_shipped, shipped_name
from reasonalloc.config import CompressionConfig, parse_arm
from reasonalloc.errors import UsageError
from reasonalloc.parts import code_of
from reasonalloc.planning.files import files_missing, files_read

if TYPE_CHECKING:
    from reasonalloc.evaluation.batch import Job, Settings

File = str | os.PathLike[str]
_CALIBRATE = {
    "profile": "reasonalloc calibrate",
    "cost profile": "reasonalloc calibrate --objective fisher",
    "statistics": "reasonalloc calibrate --objective statistics",
}


def list_files(profile: File | Sequence[File] | None) -> list[str]:
    """Paths of calibrated files, given as one, several or none.

    Raises:
        UsageError: something else.
    """
    if profile is None:
        return []
    try:
        given = [profile] if isinstance(profile, str | os.PathLike) else [*profile]
        return [os.fspath(path) for path in given]
    except TypeError:
        raise UsageError(
            f"profile={profile!r} must be the path of a calibrated file, or several"
        ) from None


def choose_files(
    arms: Sequence[str], paths: Sequence[str], architecture: Callable[[], str] | None = None
) -> dict[str, str]:
    """The files by their kind, each of which some arm reads: given ones, else the package's own.

    Args:
        arms: their names.
        paths: what ``--profile`` named, in any order.
        architecture: returns the model's ``config_hash``; None: the package's files are not used.

    Raises:
        UsageError: an arm's file is not there, two files of one kind, or one that nothing reads.
    """
    given: dict[str, str] = {}
    for path in paths:
        kind = file_kind(path)
        if kind in given:
            raise UsageError(
                f"profile={given[kind]!r} and profile={path!r} are both a {kind}: give one of each "
                "kind, or name them in the arms, as rkv/profile(path=FILE)/uniform"
            )
        given[kind] = path
    wanted: dict[str, str] = {}
    for arm in arms:
        parsed = parse_arm(arm)
        wanted |= {} if parsed is None else dict.fromkeys(files_missing(parsed).values(), arm)
    for kind, arm in wanted.items():
        own = None if kind in given or architecture is None else architecture()
        shipped = None if own is None else find_shipped(kind, own)
        if shipped is not None:
            given[kind] = shipped
        elif kind not in given:
            others = f", not {' or '.join(map(repr, paths))}" if paths else ""
            raise UsageError(
                f"arm {arm!r} reads a {kind}{others}: add --profile FILE, made with "
                f"'{_CALIBRATE[kind]}'"
            )
    for kind, path in given.items():
        if kind not in wanted:
            raise UsageError(
                f"profile={path!r} is a {kind} and has no effect with arms={','.join(arms)!r}: add "
                "one that reads it (see 'reasonalloc ls'), or leave it out"
            )
    return given


def tell_shipped(files: dict[str, str], say: Callable[[str], object]) -> None:
    """Say which files of the package are read."""
    for kind, path in files.items():
        model = shipped_name(path)
        if model is not None:
            say(f"arms read the {kind} of {model} that comes with the package")


def as_settings(files: dict[str, str]) -> dict[str, Any]:
    """The result of ``choose_files`` as arguments of ``Settings``."""
    return {
        "profile": files.get("profile"),
        "costs": files.get("cost profile"),
        "statistics": files.get("statistics"),
    }


def fingerprints(jobs: Sequence[Job], settings: Settings) -> dict[str, str]:
    """Return the fingerprint of every arm that reads files or has classes of the user's own."""
    digests: dict[str, str] = {}
    for job in jobs:
        if job.budget is not None and job.arm not in digests:
            digest = arm_digest(settings.config(job))
            digests |= {} if digest is None else {job.arm: digest}
    return digests


def arm_digest(config: CompressionConfig) -> str | None:
    """Fingerprint of an arm's calibrated files and of its own classes; None if it has none.

    Another content under the same name is another setting.

    Raises:
        UsageError: a file cannot be read.
    """
    paths, code = files_read(config), code_of(config.arm)
    digest = hashlib.sha256()
    for path in paths:
        try:
            digest.update(Path(path).read_bytes())
        except OSError as error:
            raise UsageError(f"profile {str(path)!r} cannot be read: {error.strerror}") from None
    digest.update(code.encode())
    return digest.hexdigest()[:16] if paths or code else None
