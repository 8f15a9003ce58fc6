"""Reading and checking JSON files, for every kind of calibrated file that is one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reasonalloc.errors import UsageError


def read_json(path: str | os.PathLike[str], name: str, remedy: str = "") -> Any:
    """Return what a JSON file holds.

    Args:
        path: the file.
        name: what messages call it.
        remedy: what to do if it is no JSON; "": the message says where the JSON breaks off.

    Raises:
        UsageError: the file cannot be read, or is no JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(f"{name} {str(path)!r} cannot be read: {error.strerror}") from None
    except ValueError as error:
        if remedy:
            raise UsageError(f"{name} {str(path)!r} is no JSON file: {remedy}") from None
        raise UsageError(f"{name} {str(path)!r} is not valid JSON: {error}") from None


def check_object(data: Any) -> None:
    """Refuse anything but a JSON object."""
    if not isinstance(data, dict):
        raise UsageError("the top level must be an object")


def check_version(data: dict[str, Any], expected: int) -> None:
    """Refuse a file of another version of the format."""
    if data.get("version") != expected:
        raise UsageError(f"version={data.get('version')!r}, expected {expected}")


def check_fields(data: dict[str, Any], names: Sequence[str], newer: Sequence[str] = ()) -> None:
    """Refuse an object whose fields are not these; older files have no ``newer`` ones."""
    if missing := sorted(set(names) - set(newer) - set(data)):
        raise UsageError(f"missing {', '.join(missing)}")
    if extra := sorted(set(data) - set(names)):
        raise UsageError(f"unknown field {', '.join(extra)}")


def check_choice(data: dict[str, Any], name: str, known: Sequence[str]) -> None:
    """Refuse a field with a value that is not known."""
    if data[name] not in known:
        raise UsageError(f"{name}={data[name]!r}, expected one of {known}")


def check_texts(data: dict[str, Any], names: Sequence[str]) -> None:
    """Refuse fields that are no text."""
    for name in names:
        if not isinstance(data.get(name), str):
            raise UsageError(f"{name} must be text")


#: Whole numbers in a file are sizes, or costs without a fraction.
LARGEST_WHOLE = 1 << 53


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= LARGEST_WHOLE
