"""The decode step of CPUs as one program of our own loops: ``step="compile"``."""
