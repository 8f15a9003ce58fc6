"""Connections to inference engines."""
