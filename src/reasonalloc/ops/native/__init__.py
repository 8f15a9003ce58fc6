"""Loops in C++ for CPUs, compiled on first use: attention, R-KV's scores, moving rows.

``build`` joins the ``.cpp`` files behind ``lanes.h`` and compiles them as PyTorch's Inductor does;
each has a Python file of its name, which says what it does.
"""
