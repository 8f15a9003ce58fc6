"""Caches in safetensors files: written, and read back with every number checked."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reasonalloc.errors import UsageError
from reasonalloc.files import replacing
from reasonalloc.integrations.hf.cache import BudgetCache

_FORMAT = "reasonalloc-cache-1"


def save_cache(cache: BudgetCache, path: Path, fingerprint: Mapping[str, str]) -> None:
    """Write a cache.

    Args:
        cache: that no call has left in the middle.
        path: of the file; replaced whole or not at all.
        fingerprint: what must be the same for it to be read.

    Raises:
        UsageError: the cache is empty or broken off, or the file cannot be written.
    """
    tensors, numbers = cache.content()
    kept = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    metadata = {
        "format": _FORMAT,
        "fingerprint": json.dumps(dict(fingerprint), sort_keys=True),
        "numbers": json.dumps(numbers),
    }
    metadata["crc32"] = _checksum(kept, metadata["numbers"])
    try:
        with replacing(path) as partial:
            save_file(kept, str(partial), metadata)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the cache cannot be written to {str(path)!r}: {error}") from error


def load_cache(
    cache: BudgetCache, path: Path, fingerprint: Mapping[str, str], device: torch.device
) -> None:
    """Fill an empty cache from a file.

    Args:
        cache: new, of the attachment that reads.
        path: of the file.
        fingerprint: of that attachment.
        device: where the tensors go.

    Raises:
        UsageError: the file cannot be read, is broken, or does not fit.
    """
    tensors, metadata = _read(path)
    if metadata.get("format") != _FORMAT:
        raise UsageError(f"{str(path)!r} is no saved cache: write one with save_cache()")
    try:
        saved = json.loads(metadata["fingerprint"])
        numbers = json.loads(metadata["numbers"])
    except (KeyError, ValueError) as error:
        raise UsageError(f"the cache in {str(path)!r} is broken: {error}") from error
    for name in {**fingerprint, **saved}:
        own, theirs = (given.get(name, "its default") for given in (fingerprint, saved))
        if own != theirs:
            raise UsageError(
                f"the cache in {str(path)!r} was made with {name}={theirs}, this attachment has "
                f"{name}={own}: attach as it was saved"
            )
    try:
        cache.fill(tensors, numbers, device)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"the cache in {str(path)!r} is broken: {error}") from error
    sums = (metadata.get("crc32"), _checksum(tensors, metadata["numbers"]))
    if sums[0] not in (None, sums[1]):  # files of older versions have none
        raise UsageError(
            f"the cache in {str(path)!r} is broken: its checksum is {sums[1]}, not {sums[0]}"
        )


def _checksum(tensors: Mapping[str, Tensor], numbers: str) -> str:
    """CRC-32 of everything that a file holds, as eight hexadecimal digits."""
    crc = zlib.crc32(numbers.encode("utf-8"))
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode("utf-8"), crc)
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the cache in {str(path)!r} cannot be read: {error}") from error
