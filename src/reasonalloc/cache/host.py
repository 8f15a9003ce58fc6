"""Numbers that the device computes and the host needs one boundary later, without a stall."""

from __future__ import annotations

import torch
from torch import Tensor


class DeferredMax:
    """Largest entry of an integer tensor, copied to the host in the background on CUDA.

    The copy is asked for when a compression ends and read when the next one begins, ``interval``
    decode steps later: by then it has long arrived, so reading it does not wait.
    """

    def __init__(self, values: Tensor) -> None:
        largest = values.max()
        self._event: torch.cuda.Event | None = None
        if largest.device.type == "cuda":
            self._value = torch.empty((), dtype=largest.dtype, device="cpu", pin_memory=True)
            self._value.copy_(largest, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(largest.device))
        else:
            self._value = largest

    def get(self) -> int:
        """The number, as a host integer."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._value)
