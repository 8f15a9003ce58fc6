"""Hugging Face transformers: attention function, mask function, cache and ``attach``."""

from reasonalloc.integrations.hf.attachment import Attachment, attach, attach_config, detach
from reasonalloc.integrations.hf.cache import BudgetCache

__all__ = ["Attachment", "BudgetCache", "attach", "attach_config", "detach"]
