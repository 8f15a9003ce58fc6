"""How many random examples a test tries: ``make test-random`` has its own number and seeds."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

_RANDOM = os.environ.get("HYPOTHESIS_PROFILE") == "random"

# The same examples in every run, on every machine, unless new ones are asked for.
settings.register_profile("same", derandomize=True, deadline=None, database=None, print_blob=True)
settings.register_profile("random", deadline=None, database=None, print_blob=True)
settings.load_profile("random" if _RANDOM else "same")


def examples(number: int, **further: Any) -> settings:
    """For ``@examples(100)``: so many, and ten times as many of ``make test-random``."""
    return settings(max_examples=number * (10 if _RANDOM else 1), **further)
