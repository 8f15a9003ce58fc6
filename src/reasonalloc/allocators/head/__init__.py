"""Head allocators: integer counts per (sequence, KV head) whose sum is the layer's total."""

from reasonalloc.allocators.head.base import HEAD_ALLOCATORS, HeadAllocator, HeadQuery

__all__ = ["HEAD_ALLOCATORS", "HeadAllocator", "HeadQuery"]
