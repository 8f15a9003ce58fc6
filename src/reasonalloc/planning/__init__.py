"""A budget divided among layers, and the memory that it takes: known before the first token."""
