"""Triton kernels. Importing a module of this folder needs triton."""
