from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reasonalloc.attention.coded import CodedView
from reasonalloc.attention.interface import BACKENDS, Backend, SlabView
from reasonalloc.errors import UsageError


@BACKENDS.register("cpp", source="ours; split along the run as in flash-decoding")
@dataclass(frozen=True)
class Cpp(Backend):
    """One loop over ragged runs on a CPU, compiled on first use: each head reads its own tokens."""

    native: ClassVar[bool] = True

    def check(self, device: torch.device, dtype: torch.dtype | None = None) -> None:
        if device.type != "cpu":
            raise UsageError(
                f"attention='cpp' is for CPUs, but the model is on {device}: use "
                "attention='auto' or 'triton'"
            )
        from reasonalloc.ops.native.build import require

        require("attention='cpp'", "attention='sdpa'", dtype)

    def decode(
        self,
        query: Tensor,
        slab: SlabView,
        scaling: float,
        softcap: float | None,
        need_weights: bool,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        from reasonalloc.ops.native.attention import decode

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
        from reasonalloc.ops.native.coded import decode

        return decode(query, slab, scaling, softcap, need_weights, sinks)
