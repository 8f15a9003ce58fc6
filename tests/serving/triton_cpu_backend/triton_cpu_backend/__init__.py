"""A Triton backend that is there and never active."""
