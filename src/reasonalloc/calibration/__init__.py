"""Offline measurements of a model, kept as profile files."""

from reasonalloc.calibration.attention_mass import attention_mass

__all__ = ["attention_mass"]
