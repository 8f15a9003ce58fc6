"""What vLLM calls in each of its processes when it loads its plugins."""

from __future__ import annotations


def register() -> None:
    """Entry point of ``vllm.general_plugins``: nothing changes unless an engine has a budget."""
    from reasonalloc.integrations.vllm.patches import apply_patches

    apply_patches()
