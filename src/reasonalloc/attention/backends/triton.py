from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonalloc.attention.coded import CodedView
from reasonalloc.attention.interface import BACKENDS, Backend, SlabView
from reasonalloc.errors import UsageError


def interpreting() -> bool:
    """Whether Triton's interpreter runs kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@BACKENDS.register("triton", source="ours; split along the run as in flash-decoding")
@dataclass(frozen=True)
class Triton(Backend):
    """One kernel over ragged runs on a GPU: no padding, no mask, no table on the host."""

    def check(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        if importlib.util.find_spec("triton") is None:
            raise UsageError(
                "attention='triton' needs the package triton: pip install 'reasonalloc[triton]', "
                "or use attention='sdpa'"
            )
        if device.type != "cuda" and not interpreting():
            raise UsageError(
                f"attention='triton' needs a GPU, but the model is on {device}: use "
                "attention='sdpa' or 'auto'"
            )

    def decode(
        self,
        query: Tensor,
        slab: SlabView,
        scaling: float,
        softcap: float | None,
        need_weights: bool,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        self.check(query.device)
        from reasonalloc.attention.kernels.decode import decode

        return decode(query, slab, scaling, softcap, need_weights, sinks)

    def decode_coded(
        self,
        query: Tensor,
        slab: CodedView,
        scaling: float,
        softcap: float | None,
        need_weights: bool,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        self.check(query.device)
        from reasonalloc.attention.kernels.coded import decode_coded, readable

        decode = decode_coded if readable(slab.formats) else super().decode_coded
        return decode(query, slab, scaling, softcap, need_weights, sinks)
