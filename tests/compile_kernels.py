"""Compile the decode kernels for real GPUs; run without TRITON_INTERPRET, needs no GPU."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reasonalloc.attention.kernels import decode

INTEGERS = ("kv_heads", "uniform_run", "uniform_length", "slots")
FLOATS = ("scaling", "softcap")
BUFFERS = dict.fromkeys(("parts", "peaks", "sums", "norms", "received"), "*fp32")
SHARED_MEMORY = 99 * 1024  # bytes that a program may have on sm_86 and sm_89


def build(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], warps: int) -> None:
    types = pointers | dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(FLOATS, "fp32")
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    for arch in (80, 90):
        built = triton.compile(
            ASTSource(kernel, signature, places),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": warps, "num_stages": 2},
        )
        if not built.asm["cubin"] or built.metadata.shared > SHARED_MEMORY:
            raise SystemExit(f"{kernel.__name__} on sm_{arch}: {built.metadata}")


def main() -> None:
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
            build(decode._join_kernel, data | BUFFERS, values | {"SPLITS_PAD": 4}, 1)
    print("compiled")


if __name__ == "__main__":
    main()
