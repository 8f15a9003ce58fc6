"""Files that calibration writes, validated when they are read."""
