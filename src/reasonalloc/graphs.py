"""CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def capture(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Capture what ``run`` does on a GPU, without doing it.

    Returns:
        What replays it and returns what it returned: every replay writes to the same memory.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as those that stream, may go on using the device.
    with (
        torch.cuda.device(device),
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
