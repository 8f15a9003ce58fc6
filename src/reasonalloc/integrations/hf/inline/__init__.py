"""Models whose modules compute attention themselves, not through ``AttentionInterface``."""

from reasonalloc.integrations.hf.inline.families import (
    computes_inline,
    inline_stands,
    set_attention,
)

__all__ = ["computes_inline", "inline_stands", "set_attention"]
