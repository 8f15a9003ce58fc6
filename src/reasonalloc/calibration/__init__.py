"""Offline measurements of a model, kept as files."""

from reasonalloc.calibration.attention_mass import attention_mass
from reasonalloc.calibration.statistics import statistics

__all__ = ["attention_mass", "statistics"]
