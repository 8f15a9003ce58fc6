"""Instructions, checked when their program is built, since it keeps their addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reasonalloc.cpu_step.draft import Draft
from reasonalloc.cpu_step.structs import KINDS, Operation
from reasonalloc.ops.native.structs import FLOATS


def check_draft(draft: Draft) -> None:
    """Make sure that an instruction stays within its tensors, and knows their types.

    Raises:
        RuntimeError: names the operand that is too short or of another type.
    """
    for name, reach in _reaches(draft).items():
        given = getattr(draft, name)
        if given is None:
            if name in ("out", "a"):
                raise RuntimeError(f"{draft.operation.name} without {name}")
            continue
        tensor = given[0]
        types = _TYPES.get((draft.operation, name), tuple(FLOATS if name == "out" else KINDS))
        if not tensor.is_cpu or tensor.dtype not in types:
            raise RuntimeError(
                f"{draft.operation.name}: {name} cannot be {tensor.dtype} on {tensor.device}"
            )
        size = tensor.element_size()
        room = tensor.untyped_storage().nbytes() - int(tensor.storage_offset()) * size
        bytes_ = reach if draft.operation is Operation.EMBED and name != "b" else reach * size
        if bytes_ > room:
            raise RuntimeError(
                f"{draft.operation.name}: {name} has {room} bytes, but {bytes_} are touched"
            )


# Types that an operand must have, where they are not those of the other instructions.
_INTEGERS, _SINGLE = (torch.int64,), (torch.float32,)
_TYPES = {
    (Operation.COUNT, "out"): _INTEGERS,
    (Operation.COUNT, "a"): _INTEGERS,
    (Operation.EMBED, "out"): tuple(KINDS),
    (Operation.EMBED, "b"): _INTEGERS,
    (Operation.PRODUCT, "a"): _SINGLE,
    (Operation.PRODUCT, "b"): tuple(FLOATS),
    (Operation.PRODUCT, "c"): _SINGLE,
    (Operation.PANEL, "out"): _SINGLE,
    (Operation.PANEL, "a"): tuple(FLOATS),
}


def _reaches(draft: Draft) -> dict[str, int]:
    """How many elements from its first one on an instruction touches of each operand.

    Bytes of what EMBED copies.
    """
    n = draft.sizes
    strides: dict[str, Sequence[int]] = {
        name: given[1]
        for name in ("out", "a", "b", "c")
        if (given := getattr(draft, name)) is not None
    }

    def steps(name: str, sizes: Sequence[int]) -> int:
        own = strides.get(name, (0, 0, 0, 0))
        return 1 + sum((size - 1) * step for size, step in zip(sizes, own, strict=False))

    match draft.operation:
        case Operation.ATTEND | Operation.ATTEND_CODED:
            return {}
        case Operation.COUNT:
            return {"out": n[3], "a": n[3]}
        case Operation.EMBED:
            return {"out": n[1] * n[2], "a": n[0] * n[2], "b": steps("b", (1, 1, 1, n[1]))}
        case Operation.PRODUCT:  # rows, outputs, width, columns of a panel or 0
            a = n[2] * n[3] if n[3] else steps("a", n[:1]) + n[2] - 1
            return {
                "out": steps("out", n[:1]) + n[1] - 1,
                "a": a,
                "b": steps("b", n[1:2]) + n[2] - 1,
                "c": n[1],
            }
        case Operation.PANEL:
            padded = strides["out"][0] if "out" in strides else 0
            return {"out": n[1] * padded, "a": steps("a", n[:1]) + n[1] - 1}
        case Operation.SUM:
            return {"out": steps("out", n[:3]), "a": steps("a", n)}
    return {name: steps(name, n) for name in ("out", "a", "b")}
