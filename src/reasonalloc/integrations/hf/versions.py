"""What differs between releases of transformers, and which of them were tested."""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import GenerationMixin

from reasonalloc.errors import UntestedVersion, UsageError

#: The newest minor release of transformers that all tests ran with.
NEWEST_TESTED = "5.24"
_NAMES = ("past_key_values", "cache")


@functools.cache
def cache_name() -> str:
    """Name of the cache among the arguments of a model: ``cache`` from transformers 5.24 on."""
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in known else "past_key_values"


def given_cache(call: Mapping[str, Any]) -> Any:
    """The cache among named arguments, under either name; None if there is none.

    Raises:
        UsageError: two caches.
    """
    caches = [call[name] for name in _NAMES if call.get(name) is not None]
    if len(caches) == 2 and caches[0] is not caches[1]:
        raise UsageError(f"{_NAMES[0]} and {_NAMES[1]} are two caches: pass one of them")
    return caches[0] if caches else None


def with_cache(call: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """Named arguments with this cache, under the name that the installed transformers wants."""
    return {**{k: v for k, v in call.items() if k not in _NAMES}, cache_name(): cache}


def cache_of(output: Any) -> Any:
    """The cache in what a model or ``generate`` returned."""
    return output[cache_name()]


def untested(version: str) -> str | None:
    """A note on a release of transformers that is newer than the tested ones, or None."""
    parts = [_minor(version), _minor(NEWEST_TESTED)]
    if parts[0] <= parts[1]:
        return None
    return (
        f"transformers {version} is newer than {NEWEST_TESTED}, the newest that this version of "
        "reasonalloc was tested with: run `reasonalloc doctor`, which tests it here; if something "
        "fails, report it with that command's output and use transformers "
        f"{NEWEST_TESTED} until it is fixed"
    )


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


@functools.cache
def warn_if_untested(stacklevel: int) -> None:
    """Warn once in a process if the installed transformers was not tested."""
    if (note := untested(transformers.__version__)) is not None:
        warnings.warn(note, UntestedVersion, stacklevel=stacklevel)
