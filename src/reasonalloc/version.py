"""The version, alone here so that the build can read it."""

__version__ = "0.1.0"
