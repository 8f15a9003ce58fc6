"""The command line: ``reasonalloc run | plan | ls | doctor | demo``."""
