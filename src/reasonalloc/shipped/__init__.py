"""Calibrated files that come with the package, by the fingerprint of the model they suit."""
