"""Files that calibration writes and that policies and layer allocators read.

Three kinds: demand profiles and cost profiles (JSON), statistics (safetensors).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from reasonalloc.calibrated.costs import CostProfile, load_costs
from reasonalloc.calibrated.demand import DemandProfile, load_profile
from reasonalloc.calibrated.reader import ReadsCalibrated
from reasonalloc.errors import UsageError
from reasonalloc.files import as_path

if TYPE_CHECKING:
    from reasonalloc.calibrated.statistics import Statistics

__all__ = ["CostProfile", "DemandProfile", "ReadsCalibrated", "file_kind", "open_calibrated"]


def file_kind(path: str | os.PathLike[str]) -> str:
    """Return what a calibrated file is; whether it is whole is for its reader to say.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        data = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UsageError(f"profile {str(path)!r} cannot be read: {error.strerror}") from None
    except ValueError:
        return "statistics"  # the only one that is no JSON
    return "cost profile" if isinstance(data, dict) and data.get("kind") == "cost" else "profile"


def open_calibrated(path: str | os.PathLike[str]) -> DemandProfile | CostProfile | Statistics:
    """Read a calibrated file of any kind.

    Raises:
        UsageError: it cannot be read, is none of them, or is broken; says what.
    """
    path = as_path("path", path)
    kind = file_kind(path)
    if kind == "cost profile":
        return load_costs(path)
    if kind == "profile":
        return load_profile(path)
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] != b"{":  # where a safetensors file has its header
        raise UsageError(
            f"profile {str(path)!r} is no JSON file and holds no statistics: make one with "
            "'reasonalloc calibrate'"
        )
    from reasonalloc.calibrated.statistics import load_statistics  # loads torch

    return load_statistics(path)
