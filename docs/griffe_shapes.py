"""Shapes such as ``[layers][kv_heads]`` in docstrings are no links of Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_SHAPE = re.compile(r"(?<!`)(\[[a-z_ ]+\])(\[[a-z_ ]+\])(?!`)")


class Shapes(griffe.Extension):
    """Set them as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _SHAPE.sub(r"`\1\2`", obj.docstring.value)
