"""What the loops in C++ cannot read is refused by name, before they are called."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from reasonalloc.cpu_step import build as step_build
from reasonalloc.cpu_step import compiled
from reasonalloc.cpu_step import structs as step_structs
from reasonalloc.cpu_step.draft import LINE, Draft
from reasonalloc.cpu_step.program import Arena, Program
from reasonalloc.cpu_step.structs import Operation
from reasonalloc.ops.native import budgets, build, structs
from reasonalloc.ops.native.check import address
from reasonalloc.ops.native.rkv import rkv_scores
from reasonalloc.ops.native.rows import move_rows

Change = Callable[[Tensor], Tensor]
BATCH, HEADS, SLOTS, DIM, N = 2, 3, 12, 8, 4


def spread(tensor: Tensor) -> Tensor:
    """The same numbers with gaps between the rows."""
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def shorter(tensor: Tensor) -> Tensor:
    """Without the last entry of the second dimension, or of the first if there is one alone."""
    return (tensor[:, :-1] if tensor.dim() > 1 else tensor[:-1]).contiguous()


def double(tensor: Tensor) -> Tensor:
    return tensor.double()


def to_int(tensor: Tensor) -> Tensor:
    return tensor.int()


def to_meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def refused(call: Callable[..., Any], arguments: dict[str, Any], name: str, change: Change) -> None:
    """With one argument changed, a call names it; without, it works."""
    call(**arguments)
    with pytest.raises(RuntimeError, match=rf"^{name} cannot be handed to C\+\+"):
        call(**{**arguments, name: change(arguments[name])})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("own", change) for change in (spread, to_meta)),
        *(("flat", change) for change in (double, to_meta)),
        *(("index", change) for change in (to_int, to_meta)),
        *(("keep", change) for change in (to_int, shorter, to_meta)),
        *(("offsets", change) for change in (to_int, shorter, to_meta)),
    ],
)
def test_rows(name: str, change: Change) -> None:
    refused(move_rows, rows(), name, change)


def rows() -> dict[str, Any]:
    return {
        "own": torch.zeros(BATCH, SLOTS, DIM),
        "flat": torch.randn(BATCH, SLOTS, DIM),
        "index": torch.arange(HEADS * N).view(1, HEADS, N).repeat(BATCH, 1, 1),
        "keep": torch.ones(BATCH, HEADS, N, dtype=torch.bool),
        "offsets": torch.arange(0, SLOTS, N).repeat(BATCH, 1),
    }


@pytest.mark.parametrize("place", [-1, SLOTS])
def test_rows_from_outside(place: int) -> None:
    arguments = rows()
    arguments["index"][1, 2, 3] = place
    with pytest.raises(RuntimeError, match="a row comes from outside"):
        move_rows(**arguments)
    assert bool(arguments["own"][0].any()) and not bool(arguments["own"][1].any())
    arguments["keep"][1, 2, 3] = False  # what goes may be anything
    move_rows(**arguments)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("queries", change) for change in (double, shorter)),
        *(("keys", change) for change in (double, lambda keys: keys[..., :-1], to_meta)),
        *(("index", change) for change in (to_int, to_meta)),
        *(("lengths", change) for change in (to_int, shorter)),
        *(("sinks", change) for change in (shorter, to_meta)),
    ],
)
def test_scores_of_rkv(name: str, change: Change) -> None:
    refused(rkv_scores, scores(), name, change)


def scores() -> dict[str, Any]:
    return {
        "queries": torch.randn(BATCH, HEADS, 2, 2, DIM),
        "keys": torch.randn(BATCH, SLOTS, DIM),
        "index": torch.arange(HEADS * N).view(1, HEADS, N).repeat(BATCH, 1, 1),
        "lengths": torch.full((BATCH, HEADS), N),
        "lam": 0.1,
        "kernel": 7,
        "threshold": 0.5,
        "softcap": None,
        "sinks": torch.randn(HEADS, 2),
    }


@pytest.mark.parametrize(
    ("name", "wrong"), [("index", -1), ("index", SLOTS), ("lengths", N + 1), ("lengths", -1)]
)
def test_scores_of_keys_outside(name: str, wrong: int) -> None:
    arguments = scores()
    arguments[name].view(-1)[-1] = wrong
    with pytest.raises(RuntimeError, match="points outside of the storage"):
        rkv_scores(**arguments)


@pytest.mark.parametrize(
    ("name", "change"),
    [("scores", double), ("lengths", shorter), ("budgets", shorter), ("lengths", to_meta)],
)
def test_selection(name: str, change: Change) -> None:
    arguments: dict[str, Any] = {
        "scores": torch.randn(BATCH, HEADS, N),
        "lengths": torch.full((BATCH, HEADS), N),
        "budgets": torch.full((BATCH, HEADS), 2),
        "window": 1,
        "recent_fraction": 0.0,
        "forced": None,
    }
    refused(budgets.select, arguments, name, change)
    for bad, wrong in (("lengths", N + 1), ("lengths", -1), ("budgets", -1)):
        with pytest.raises(RuntimeError, match="points outside"):
            budgets.select(**{**arguments, bad: torch.full((BATCH, HEADS), wrong)})


@pytest.mark.parametrize(
    ("name", "change"), [("scores", double), ("lengths", shorter), ("total", shorter)]
)
def test_counts(name: str, change: Change) -> None:
    arguments: dict[str, Any] = {
        "scores": torch.randn(BATCH, HEADS, N),
        "lengths": torch.full((BATCH, HEADS), N),
        "total": torch.full((BATCH,), 5),
        "window": 1,
        "scaled": True,
    }
    refused(budgets.pooled_counts, arguments, name, change)


def slab() -> dict[str, Any]:
    """Arguments of ``ragged_step``, in its order."""
    return {
        "query": torch.randn(BATCH, 2 * HEADS, 1, DIM),
        "keys": torch.randn(BATCH, SLOTS, DIM),
        "values": torch.randn(BATCH, SLOTS, DIM),
        "offsets": torch.arange(0, SLOTS, N).repeat(BATCH, 1),
        "lengths": torch.full((BATCH, HEADS), 2),
        "scaling": 0.3,
        "softcap": 0.0,
        "sinks": torch.randn(2 * HEADS),
        "key": torch.randn(BATCH, HEADS, 1, DIM),
        "value": torch.randn(BATCH, HEADS, 1, DIM),
        "positions": torch.zeros(BATCH, SLOTS, dtype=torch.int32),
        "seen": torch.full((BATCH,), 5),
        "state": torch.randn(BATCH, SLOTS, 2),
        "ring": torch.zeros(BATCH, 4, 2 * HEADS, DIM),
        "need_weights": True,
    }


def step(**arguments: Any) -> Any:
    return torch.ops.reasonalloc.ragged_step(*arguments.values())


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}


STORED = [
    ("query", double),
    *(("sinks", change) for change in (double, shorter, spread)),
    *(("keys", change) for change in (double, spread)),
    *(("values", change) for change in (double, spread)),
    *(("offsets", change) for change in (to_int, shorter)),
    *(("lengths", change) for change in (to_int, spread)),
    *(("key", change) for change in (torch.Tensor.bfloat16, shorter)),
    *(("value", change) for change in (torch.Tensor.bfloat16, shorter)),
    *(("positions", change) for change in (torch.Tensor.long, shorter, spread)),
    *(("seen", change) for change in (to_int, shorter, spread)),
    *(("state", change) for change in (torch.Tensor.bfloat16, double, shorter, spread)),
    *(("ring", change) for change in (torch.Tensor.half, spread, lambda ring: ring[..., :-1])),
]


@pytest.mark.parametrize(("name", "change"), STORED)
def test_a_step(name: str, change: Change) -> None:
    """Refused before anything is stored."""
    arguments = slab()
    step(**copied(arguments))
    arguments[name] = change(arguments[name])
    before = copied(arguments)
    with pytest.raises(RuntimeError, match=rf"^{name} cannot be handed to C\+\+"):
        step(**arguments)
    for key, tensor in before.items():
        assert not isinstance(tensor, Tensor) or torch.equal(tensor, arguments[key])


@pytest.mark.parametrize(("name", "change"), STORED)
def test_a_program_is_checked_when_it_is_built(name: str, change: Change) -> None:
    arguments = slab()
    arguments[name] = change(arguments[name])
    call = compiled.Call(
        torch.ops.reasonalloc.ragged_step.default,
        tuple(arguments.values()),
        {},
        (torch.zeros(BATCH, 2 * HEADS, 1, DIM), torch.zeros(BATCH, SLOTS)),
    )
    drafts = compiled.drafts_of(call)
    assert drafts is not None
    with pytest.raises(RuntimeError, match=rf"^{name} cannot be handed to C\+\+"):
        Program(drafts, Arena(drafts, set()))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("lengths", SLOTS, "a run is full"),
        ("lengths", -1, "points outside"),
        ("offsets", -1, "points outside"),
        ("seen", -1, "points outside"),
    ],
)
def test_a_step_outside(name: str, wrong: int, message: str) -> None:
    arguments = slab()
    arguments[name].view(-1)[-1] = wrong
    with pytest.raises(RuntimeError, match=message):
        step(**arguments)


@pytest.mark.parametrize(("name", "wrong"), [("lengths", SLOTS + 1), ("lengths", -1)])
def test_attention_outside(name: str, wrong: int) -> None:
    arguments = slab()
    arguments[name].view(-1)[-1] = wrong
    given = list(arguments.values())
    with pytest.raises(RuntimeError, match="points outside"):
        torch.ops.reasonalloc.ragged_decode(*given[:8], False)


def draft(operation: Operation, sizes: Any, out: Tensor, a: Tensor, b: Any = None) -> Draft:
    return Draft(operation, sizes, (out, LINE), (a, LINE), None if b is None else (b, LINE))


LINES = {n: torch.zeros(n) for n in (4, 8)}
WRONG = {
    "COPY: out has 16 bytes, but 32 are touched": draft(
        Operation.COPY, (1, 1, 1, 8), LINES[4], LINES[8]
    ),
    "ADD: b has 16 bytes, but 32 are touched": draft(
        Operation.ADD, (1, 1, 1, 8), LINES[8], LINES[8], LINES[4]
    ),
    "TANH: out cannot be torch.float64 on cpu": draft(
        Operation.TANH, (1, 1, 1, 8), LINES[8].double(), LINES[8]
    ),
    "COUNT: a cannot be torch.int32 on cpu": draft(
        Operation.COUNT, (1, 1, 1, 4), LINES[4].long(), LINES[4].int()
    ),
    "PRODUCT: b has 12 bytes, but 16 are touched": draft(
        Operation.PRODUCT, (1, 1, 4, 0), LINES[4], LINES[4], LINES[4][1:]
    ),
    "PRODUCT: a cannot be torch.float16 on cpu": draft(
        Operation.PRODUCT, (1, 1, 4, 0), LINES[4], LINES[4].half(), LINES[4]
    ),
    "PANEL: out has 16 bytes, but 256 are touched": Draft(
        Operation.PANEL, (1, 8, 0, 0), (LINES[4], (8, 0, 0, 0)), (LINES[8], (8, 0, 0, 0))
    ),
    "EMBED: a has 32 bytes, but 48 are touched": draft(
        Operation.EMBED, (3, 1, 16, 0), LINES[4], LINES[8], torch.zeros(1, dtype=torch.int64)
    ),
    "SUM: a has 32 bytes, but 64 are touched": Draft(
        Operation.SUM, (1, 1, 2, 8), (LINES[4], (0, 0, 1, 0)), (LINES[8], (0, 0, 8, 1))
    ),
    "NEGATE without a": Draft(Operation.NEGATE, (1, 1, 1, 4), (LINES[4], LINE)),
}


@pytest.mark.parametrize("message", WRONG)
def test_an_instruction_that_leaves_its_tensors(message: str) -> None:
    with pytest.raises(RuntimeError, match=message.replace(".", r"\.")):
        Program([WRONG[message]], Arena([WRONG[message]], set()))


def test_what_is_asked_for_is_named() -> None:
    ring = torch.zeros(2, 3)
    assert address("ring", ring, torch.float32, [2, 3]) == ring.data_ptr()
    for tensor, dtype, message in (
        (ring.double(), None, r"one of torch\.float32, .*but it is \[2, 3\] of torch\.float64"),
        (ring.t(), torch.float32, r"must be \[2, 3\] .* strides \[1, 3\] on cpu"),
        (ring[:, :2], torch.float32, r"but it is \[2, 2\]"),
        (ring.to("meta"), torch.float32, "on meta"),
    ):
        with pytest.raises(RuntimeError, match=message):
            address("ring", tensor, dtype, [2, 3])


def test_structures_are_compared_where_the_loops_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def check(functions: Any) -> None:
        step_structs.check_layout(functions)
        structs.check_size(functions, "attend", structs.Attend)

    step, attention = step_build.library(), build.library()
    found = SimpleNamespace(
        reasonalloc_bytes_of_operand=step.reasonalloc_bytes_of_operand,
        reasonalloc_bytes_of_instruction=step.reasonalloc_bytes_of_instruction,
        reasonalloc_operations=step.reasonalloc_operations,
        reasonalloc_bytes_of_attend=attention.reasonalloc_bytes_of_attend,
    )
    check(found)
    for name, wrong, message in (
        ("bytes_of_attend", 8, "Attend has 8 bytes in C"),
        ("bytes_of_instruction", 8, "Instruction has 8 bytes in C"),
        ("operations", b"Copy", r"operations are \['Copy'\] in C"),
    ):
        fake = SimpleNamespace(**vars(found))
        setattr(fake, f"reasonalloc_{name}", lambda wrong=wrong: wrong)
        with pytest.raises(RuntimeError, match=message):
            check(fake)
