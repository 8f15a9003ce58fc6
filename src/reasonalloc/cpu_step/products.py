"""``products.cpp``: instructions for products of a few rows with weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reasonalloc.cpu_step.draft import LINE, Draft, Strides, storage_of
from reasonalloc.cpu_step.elementwise import as_float_rows, known
from reasonalloc.cpu_step.structs import Operation, Share
from reasonalloc.ops.native.structs import FLOATS

#: Rows up to which products with weights are our own.
MOST_ROWS = 32
_AMX_ROWS, _PAIRS_ROWS = 4, 16  # see `most_rows`
_DOTS = 4  # rows up to which they are read as they lie: see products.cpp


def product(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> list[Draft] | None:
    """``out = x @ w + bias``, or None where it is PyTorch's.

    Args:
        x: [rows, width].
        w: [width, outputs], the weights transposed.
        bias: [outputs] or None.
        out: [rows, outputs].
    """
    rows, width = x.shape
    if not (
        0 < rows <= most_rows(w.dtype)
        and width > 0
        and w.stride(0) == 1
        and w.stride(1) >= width
        and all(t.dtype in FLOATS and known(t.dtype) for t in (x, w, out))
        and out.stride(1) == 1
    ):
        return None
    drafts: list[Draft] = []
    padded = 0
    if rows > _DOTS:
        padded = -(-rows // 8) * 8
        x = _panel(x, padded, drafts)
    else:
        x = as_float_rows(x, drafts)
    operand = None
    if bias is not None:
        if bias.dim() != 1 or bias.dtype not in FLOATS or len(bias) != w.shape[1]:
            return None
        operand = (as_float_rows(bias[None], drafts)[0], LINE)
    drafts.append(
        Draft(
            Operation.PRODUCT,
            (rows, w.shape[1], width, padded),
            (out, (out.stride(0), 0, 0, 0)),
            (x, (x.stride(0), 0, 0, 0)),
            (w, (w.stride(1), 0, 0, 0)),
            operand,
            share=Share.BLOCKS,
        )
    )
    return drafts


@functools.cache
def most_rows(dtype: torch.dtype) -> int:
    """Rows up to which products with weights of this type are our own.

    Processors may have instructions for products of 16-bit numbers, which PyTorch uses: for whole
    matrices (AMX), which nothing else comes near, or for pairs, which pay with more rows.
    """
    if dtype is torch.float16:
        return _AMX_ROWS if torch.cpu._is_amx_fp16_supported() else MOST_ROWS
    if dtype is torch.bfloat16:
        if torch.cpu._is_amx_tile_supported():
            return _AMX_ROWS
        abilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # newer ones
        return _PAIRS_ROWS if abilities.get("avx512_bf16") else MOST_ROWS
    return MOST_ROWS


def _panel(x: Tensor, padded: int, drafts: list[Draft]) -> Tensor:
    """The rows as floats [width, padded], one number of all rows after the other."""
    if x.stride(1) != 1 and x.shape[1] != 1:
        x = as_float_rows(x, drafts)
    panel = torch.empty(x.shape[1], padded, dtype=torch.float32, device="cpu")
    draft = Draft(
        Operation.PANEL,
        (*x.shape, 0, 0),
        (panel, (padded, 0, 0, 0)),
        (x, (x.stride(0), 0, 0, 0)),
        share=Share.BLOCKS,
    )
    draft.temporary.add(storage_of(panel))
    drafts.append(draft)
    return panel


def one_panel_each(drafts: Sequence[Draft]) -> list[Draft]:
    """The same without panels of rows that are laid out already, and have not changed since."""
    panels: dict[int, dict[tuple[int, ...], Tensor]] = {}  # of a storage: of places in it
    instead: dict[int, tuple[Tensor, Strides]] = {}  # of a storage
    kept = []
    for draft in drafts:
        if draft.operation is Operation.PANEL and draft.out and draft.a:
            (panel, strides), (x, _) = draft.out, draft.a
            place = (int(x.storage_offset()), *x.stride(), *x.shape)
            first = panels.setdefault(storage_of(x), {}).setdefault(place, panel)
            if first is not panel:
                instead[storage_of(panel)] = first, strides
                continue
        elif draft.a is not None and storage_of(draft.a[0]) in instead:
            draft.a = instead[storage_of(draft.a[0])]
        for tensor in draft.tensors()[1]:
            panels.pop(storage_of(tensor), None)
        kept.append(draft)
    return kept
