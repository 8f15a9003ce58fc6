"""Compile kernels for real GPUs: those of ``plain`` runs, or of ``coded`` ones.

Run without TRITON_INTERPRET, needs no GPU.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reasonalloc.attention.kernels import coded, decode
from reasonalloc.ops.codes import row_format

INTEGERS = ("kv_heads", "uniform_run", "uniform_length", "slots", "count", "pool_bytes")
INTEGERS += ("coded_slots", "room", "run_blocks", "query_heads")
FLOATS = ("scaling", "softcap")
BUFFERS = dict.fromkeys(("parts", "peaks", "sums", "norms", "received", "sinks"), "*fp32")
SHARED_MEMORY = 99 * 1024  # bytes that a program may have on sm_86 and sm_89
CODED = (
    ("bf16", "int8:int4", 256),
    ("bf16", "int4h:fp8", 80),
    ("fp16", "fp8:int8", 256),
    ("fp16", "auto", 80),
    ("fp32", "int4:auto", 64),
)


def build(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int) -> None:
    types = pointers | dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(FLOATS, "fp32")
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {  # as tensors are
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    for arch in (80, 90):
        built = triton.compile(
            ASTSource(kernel, signature, places, aligned),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": warps, "num_stages": 2},
        )
        if not built.asm["cubin"] or built.metadata.shared > SHARED_MEMORY:
            raise SystemExit(f"{kernel.__name__} on sm_{arch}: {built.metadata}")


def build_coded(name: str, kv_dtype: str, dim: int) -> None:
    """The kernels of coded runs; ``name`` of triton's element types."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]
    form = row_format(kv_dtype, dim, dim, dtype)
    types = dict.fromkeys(("query", "tail_keys", "tail_values"), "*" + name) | BUFFERS
    types |= dict.fromkeys(("starts", "offsets", "lengths", "tail_lengths"), "*i64")
    types |= {"pool": "*u8", "halves": "*i16", "heads": "*i32"}
    types["turned"] = "*fp32" if form.key.kind == "int4h" else "*" + name
    pad = coded._padded(dim)
    shared = {
        "GROUP": 4,
        "GROUP_PAD": 16,
        "DIM": dim,
        "DIM_PAD": pad,
        "BLOCK": decode._block(dim, 4),
        "SOFTCAP": dim == 80,
        "PRECISION": "ieee" if name == "fp32" else "tf32",
        "WIDTH": form.width,
        "ALIGN": form.width & -form.width,
        "KEY": coded._kind(form.key.kind),
        "KEY_NUMBERS_AT": form.key_numbers_at,
    }
    values = {"VDIM": dim, "VDIM_PAD": pad, "SPLITS": 4, "TAIL_SPLITS": 2}
    values |= {"VALUE": coded._kind(form.value.kind), "VALUE_AT": form.value_at}
    values["VALUE_NUMBERS_AT"] = form.value_numbers_at
    build(coded._split_kernel, types, shared | values, 4)
    build(coded._received_kernel, types, shared, 4)


def build_all_coded() -> None:
    for name, kv_dtype, dim in CODED:
        build_coded(name, kv_dtype, dim)


def build_all_plain() -> None:
    for kind, size in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        for dim in (64, 128, 256):
            data = dict.fromkeys(("query", "keys", "values", "out"), "*" + kind)
            values = {"VDIM": dim, "VDIM_PAD": dim, "SPLITS": 4}
            for uniform in (False, True):
                table = "*" + kind if uniform else "*i64"
                pointers = data | BUFFERS | {"offsets": table, "lengths": table}
                constants = {
                    "GROUP": 4,
                    "GROUP_PAD": 16,
                    "DIM": dim,
                    "DIM_PAD": dim,
                    "BLOCK": decode._block(dim, size),
                    "UNIFORM": uniform,
                    "SOFTCAP": uniform,
                }
                build(decode._split_kernel, pointers, constants | values, 4)
                build(decode._received_kernel, pointers, constants, 4)
            for sinks in (False, True):
                constants = values | {"SPLITS_PAD": 4, "SINKS": sinks}
                build(decode._join_kernel, data | BUFFERS, constants, 1)


if __name__ == "__main__":
    {"plain": build_all_plain, "coded": build_all_coded}[sys.argv[1]]()
    print("compiled")
