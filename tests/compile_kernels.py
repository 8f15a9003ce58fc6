"""Compile kernels for real GPUs: of ``plain`` runs, ``coded``, ``paged`` or ``paged-coded`` ones.

``all-paged`` are all of the last two.

Run without TRITON_INTERPRET, needs no GPU.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from reasonalloc.attention.kernels import coded, decode, paged
from reasonalloc.ops.codes import row_format
from reasonalloc.ops.page_rows import PageRows

INTEGERS = ("kv_heads", "uniform_run", "uniform_length", "slots", "count", "pool_bytes")
INTEGERS += ("coded_slots", "room", "run_blocks", "query_heads")
INTEGERS += ("layer", "table_slots", "max_blocks", "table_stride", "ring_width", "query_row")
INTEGERS += ("key_token", "key_head", "value_token", "value_head", "query_token", "query_head")
INTEGERS += ("layer_stride", "head_stride", "token_stride", "value_at", "out_row", "out_head")
INTEGERS += ("splits", "tail_splits", "turned_row", "turned_head")
FLOATS = ("scaling", "softcap", "key_scale", "value_scale")
BUFFERS = dict.fromkeys(("parts", "peaks", "sums", "norms", "received", "sinks", "lse"), "*fp32")
TABLES = ("table", "seq_lens", "slots", "first", "shift", "plain")
TABLES += ("token_row", "token_position", "ring_row", "coded", "begin", "heads")
# Rows of 16-bit numbers begin at multiples of 16 bytes, and triton sees it.
DIVISIBLE = ("block_stride", "layer_stride", "head_stride", "token_stride", "value_at")
DIVISIBLE += ("query_row", "query_head", "turned_row", "turned_head")
DIVISIBLE += ("key_token", "key_head", "value_token", "value_head")
SHARED_MEMORY = 99 * 1024  # bytes that a program may have on sm_86 and sm_89
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CODED = (
    ("bf16", "int8:int4", 256),
    ("bf16", "int4h:fp8", 80),
    ("fp16", "fp8:int8", 256),
    ("fp16", "auto", 80),
    ("fp32", "int4:auto", 64),
)


def build(
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    stages: int = 2,
    archs: Sequence[int] = (80, 90),
) -> None:
    types = dict.fromkeys(INTEGERS, "i32") | dict.fromkeys(FLOATS, "fp32") | pointers
    types["block_stride"] = "i64"
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = {  # as tensors are
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name in DIVISIBLE
    }
    for arch in archs:
        built = triton.compile(
            ASTSource(kernel, signature, places, aligned),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": warps, "num_stages": stages},
        )
        if not built.asm["cubin"] or built.metadata.shared > SHARED_MEMORY:
            raise SystemExit(f"{kernel.__name__} on sm_{arch}: {built.metadata}")


def build_coded(name: str, kv_dtype: str, dim: int) -> None:
    """The kernels of coded runs; ``name`` of triton's element types."""
    dtype = TYPES[name]
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
    build_latent(128)


def build_latent(heads: int, dim: int = 576) -> None:
    """One KV head that all query heads read, as in DeepSeek-V3."""
    data = dict.fromkeys(("query", "keys", "values", "out"), "*bf16")
    values = {"VDIM": dim, "VDIM_PAD": 1024, "SPLITS": 64}
    pointers = data | BUFFERS | {"offsets": "*i64", "lengths": "*i64"}
    constants = {
        "GROUP": heads,
        "GROUP_PAD": decode._tile(heads, dim),
        "DIM": dim,
        "DIM_PAD": 1024,
        "BLOCK": decode._block(dim, 2),
        "UNIFORM": False,
        "SOFTCAP": False,
    }
    stages = decode._stages(dim, 2)
    build(decode._split_kernel, pointers, constants | values, 4, stages)
    build(decode._received_kernel, pointers, constants, 4)
    joined = values | {"SPLITS_PAD": 64, "SINKS": False}
    build(decode._join_kernel, data | BUFFERS, joined, 4)


def build_paged(name: str, dim: int, fp8: bool, arch: int) -> None:
    """The kernels of runs in a pool of pages, as Llama-8B has them but for ``dim``."""
    dtype = TYPES[name]
    own = paged.decode._E4M3 if arch >= 89 else paged.decode._BITS
    pointers = dict.fromkeys(("query", "key", "value", "out", "ring"), "*" + name) | BUFFERS
    pointers |= dict.fromkeys(TABLES, "*i32") | {"pool": "*u8" if fp8 else "*" + name}
    sizes = {"HEADS": 8, "GROUP": 4, "DIM": dim, "DIM_PAD": dim}
    pages = {"PER_BLOCK": 8 * 32, "BLOCK_SIZE": 16}
    block = {"BLOCK": decode._block(dim, dtype.itemsize)}
    form = own if fp8 else paged.decode._AS_IT_IS
    reading = {"GROUP_PAD": 16, "SOFTCAP": dim == 256, "FORM": form, "SPLITS": 4}
    launch = paged.decode._launch(dtype)
    launched = launch["num_warps"], launch["num_stages"], (arch,)
    build(paged.decode._decode_kernel, pointers, sizes | pages | block | reading, *launched)
    joining = {"SPLITS_PAD": 4, "SINKS": dim != 128, "ALL": fp8}
    build(paged.decode._join_kernel, pointers, sizes | block | joining, 1, archs=(arch,))
    storing = {"GROUP_PAD": 4, "FP8": fp8, "NOTE": dim != 64}
    build(paged.store._store_kernel, pointers, sizes | pages | storing, 1, archs=(arch,))


def build_paged_coded(name: str, kv_dtype: str, dim: int, channels: int, arch: int) -> None:
    """The kernel of runs that begin with coded pages, as Llama-8B has them but for ``dim``."""
    dtype = TYPES[name]
    form = row_format(kv_dtype, dim, dim, dtype)
    rows = PageRows(form, channels, 2 * 16 * dim * dtype.itemsize)
    pointers = BUFFERS | dict.fromkeys(TABLES, "*i32") | {"codes": "*u8", "halves": "*i16"}
    pointers |= dict.fromkeys(("query", "pool"), "*" + name)
    pointers["turned"] = "*fp32" if form.key.kind == "int4h" else "*" + name
    formats, _ = paged.coded._formats((rows,), 16, dim, dtype)
    constants: dict[str, Any] = {
        "HEADS": 8,
        "PER_BLOCK": 8 * 32,
        "BLOCK_SIZE": 16,
        "GROUP": 4,
        "GROUP_PAD": 16,
        "DIM": dim,
        "DIM_PAD": coded._padded(dim),
        "BLOCK": decode._block(dim, 4),
        "TAIL_BLOCK": decode._block(dim, dtype.itemsize),
        "SOFTCAP": dim == 80,
        "PRECISION": "ieee" if name == "fp32" else "tf32",
    }
    constants |= dict(zip(paged.coded._FORMAT, formats, strict=False))
    launch = paged.coded._launch(dtype)
    launched = launch["num_warps"], launch["num_stages"], (arch,)
    build(paged.coded._coded_kernel, pointers, constants, *launched)


def build_some_paged() -> None:
    """Every type, width and GPU at least once."""
    build_paged("bf16", 128, False, 80)
    build_paged("fp16", 64, True, 80)
    build_paged("fp32", 128, False, 90)
    build_paged("bf16", 128, True, 90)
    build_paged("fp16", 256, False, 100)


def build_some_paged_coded() -> None:
    """Every type, width, format and GPU at least once."""
    build_paged_coded("bf16", "int8:int4", 128, 1, 80)
    build_paged_coded("fp16", "int4h", 80, 0, 80)
    build_paged_coded("bf16", "int8", 128, 2, 90)
    build_paged_coded("fp32", "auto:fp8", 64, 1, 90)
    build_paged_coded("fp16", "int4:auto", 256, 1, 100)


def build_all_paged() -> None:
    for name, dim, arch in itertools.product(TYPES, (64, 128, 256), (80, 90, 100)):
        for fp8 in (False, True)[: 2 if name != "fp32" else 1]:
            build_paged(name, dim, fp8, arch)
    kinds = itertools.cycle(("int8", "int8:int4", "int4h", "fp8", "auto"))
    for name, dim, arch in itertools.product(TYPES, (64, 80, 128, 256), (80, 90, 100)):
        build_paged_coded(name, next(kinds), dim, dim % 3, arch)


BUILDS = {
    "plain": build_all_plain,
    "coded": build_all_coded,
    "paged": build_some_paged,
    "paged-coded": build_some_paged_coded,
    "all-paged": build_all_paged,
}

if __name__ == "__main__":
    BUILDS[sys.argv[1]]()
    print("compiled")
