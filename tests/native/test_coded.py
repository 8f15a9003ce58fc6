"""The loops in C++ over coded runs against the reference, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from examples import examples
from made_coded import MadeCoded, random_coded
from reasonalloc.attention import BACKENDS
from reasonalloc.attention.coded import decode_coded
from reasonalloc.cpu_step import compiled
from reasonalloc.cpu_step.program import Arena, Program
from reasonalloc.ops import TORCH, choose_operations
from reasonalloc.ops.codes import KINDS, VALUE_KINDS, Field, RowFormat
from reasonalloc.ops.native import build, coded, structs
from reasonalloc.ops.native.attention import NewToken
from strategies import lengths_of_heads

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# As pairs go, the last of them odd: then the 4 bits of int4 are not to be had.
DIMS = [(24, 24), (48, 80), (64, 64), (80, 48), (96, 130), (128, 128), (256, 20), (33, 7)]


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Any:
    """More threads than runs, and fewer."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@st.composite
def layers(draw: st.DrawFn, spare: int = 0) -> MadeCoded:
    """Layers of all formats, alike in all heads or not."""
    held = st.one_of(st.integers(0, 300), st.sampled_from([0, 1, 255, 256, 257]))
    tail = st.one_of(st.integers(0, 70), st.just(0))
    lengths = draw(lengths_of_heads(st.tuples(held, tail), 3, 2))
    dims = draw(st.sampled_from(DIMS))
    kinds = st.tuples(st.sampled_from(list(KINDS)), st.sampled_from(VALUE_KINDS)).filter(
        lambda pair: dims[0] % 2 == 0 or not any("int4" in kind for kind in pair)
    )
    each = draw(st.one_of(kinds.map(lambda k: [k] * 3), st.lists(kinds, min_size=3, max_size=3)))
    dtypes = draw(st.tuples(*[st.sampled_from(list(TOLERANCE))] * 2))
    seed = draw(st.integers(0, 10**6))
    return random_coded(seed, lengths, each[: len(lengths[0])], dims, dtypes, spare)


def query_for(slab: MadeCoded, group: int, dtype: torch.dtype) -> Tensor:
    """As models pass it: heads behind tokens in memory."""
    batch, heads, _, dim = slab.tail_keys.shape
    return torch.randn(batch, 1, heads * group, dim).to(dtype).transpose(1, 2)


def compare(got: Any, expected: Any, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("threads")
@given(
    layers(),
    st.integers(1, 16),
    st.sampled_from([None, 2.0]),
    st.sampled_from(list(TOLERANCE)),
    st.booleans(),
)
@examples(120)
def test_attention_is_the_reference(
    slab: MadeCoded, group: int, softcap: float | None, dtype: torch.dtype, sunk: bool
) -> None:
    query = query_for(slab, group, dtype)
    if group % 4 == 0:
        query = spread(query)
    sinks = 2 * torch.randn(query.shape[1]) if sunk else None
    how = (0.3, softcap, True, sinks)
    out, received = BACKENDS.create("cpp").decode_coded(query, slab, *how)
    again, none = BACKENDS.create("cpp").decode_coded(query, slab, 0.3, softcap, False, sinks)
    assert none is None and torch.equal(out, again)
    compare((out, received), decode_coded(query, slab, *how), out.dtype)


@pytest.mark.usefixtures("threads")
@given(layers(spare=2), st.integers(1, 5), st.booleans(), st.booleans(), st.booleans())
@examples(60)
def test_a_step_is_the_reference(
    slab: MadeCoded, group: int, state: bool, need_weights: bool, sunk: bool
) -> None:
    """Stored, noted, and attended to."""
    batch, heads, _, dim = slab.tail_keys.shape
    if not state:
        slab.state = None
    slow, token = slab.copy(), (batch, heads, 1)
    ring = torch.zeros(batch, 3, heads * group, dim)
    seen = torch.randint(0, 1000, (batch,))
    sinks = 2 * torch.randn(heads * group) if sunk else None
    for _ in range(2):
        query = query_for(slab, group, torch.float32)
        key = torch.randn(*token, dim).to(slab.tail_keys.dtype)
        value = torch.randn(*token, slab.tail_values.shape[3]).to(slab.tail_values.dtype)
        got = choose_operations(native=True).step_coded(
            query, key, value, seen, slab, ring, 0.3, None, need_weights, sinks
        )
        slow.store(key, value, seen)
        expected = decode_coded(query, slow, 0.3, None, need_weights, sinks)
        assert got is not None and (got[1] is None) == (not need_weights)
        compare(got, expected, got[0].dtype)
        for b in range(batch):
            assert torch.equal(ring[b, seen[b] % 3], query[b, :, 0])
        seen += 1
    for name, tensor in vars(slow).items():
        assert not isinstance(tensor, Tensor) or torch.equal(tensor, getattr(slab, name)), name


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("value_dim", [256, 2])
@pytest.mark.parametrize("scale", [1.0, 2.0**-24, 2.0**-14, 1.5])
def test_every_code_of_fp8(flush: bool, value_dim: int, scale: float) -> None:
    """In vectors and one by one, whatever the machine does with denormal numbers."""
    heads = 256 // value_dim
    slab = random_coded(0, [[(1, 0)] * heads], [("int8", "fp8")] * heads, (8, value_dim), FLOAT32)
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes & 127 == 127] = 0  # not a number
    half = torch.tensor([scale], dtype=torch.float16)
    for h in range(heads):
        row, start = slab.formats[h], int(slab.starts[0, h])
        slab.pool[0, start + 8 : start + 8 + value_dim] = codes.view(heads, -1)[h]
        slab.pool[0, start + row.value_numbers_at :][:2] = half.view(torch.uint8)
    expected = codes.view(torch.float8_e4m3fn).float() * half.float()
    torch.set_flush_denormal(flush)
    try:
        out, _ = BACKENDS.create("cpp").decode_coded(
            torch.randn(1, heads, 1, 8), slab, 1.0, None, False
        )
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(out.flatten(), expected)


def test_a_group_of_one_number_twice() -> None:
    """Scales of 0, and numbers that half precision does not reach."""
    slab = random_coded(0, [[(3, 0)]], [("int4", "int4")], (48, 48), FLOAT32)
    row = slab.formats[0]
    keys, values = torch.full((3, 48), 2.0), torch.full((3, 48), 1e6)
    slab.pool[0, : 3 * row.width] = row.encode(keys, values).flatten()
    query = query_for(slab, 1, torch.float32)
    compare(
        coded.decode(query, slab, 0.1, None, True),
        decode_coded(query, slab, 0.1, None, True),
        torch.float32,
    )


FLOAT32 = (torch.float32, torch.float32)
KINDS_OF_HEADS = [("int8", "int4"), ("int4h", "auto"), ("fp8", "fp8")]
BATCH, HEADS, DIM = 2, 3, 16


def arguments() -> dict[str, Any]:
    """Those of ``coded_step``, in its order."""
    lengths = [[(3, 1), (0, 2), (5, 0)], [(4, 2), (2, 2), (1, 1)]]
    slab = random_coded(0, lengths, KINDS_OF_HEADS, (DIM, DIM), FLOAT32, spare=2)
    token = BATCH, HEADS, 1, DIM
    return {
        "query": torch.randn(BATCH, 2 * HEADS, 1, DIM),
        **coded._input_of(slab)._asdict(),
        "scaling": 0.3,
        "softcap": 0.0,
        "sinks": torch.randn(2 * HEADS),
        "key": torch.randn(token),
        "value": torch.randn(token),
        "positions": slab.positions,
        "seen": torch.full((BATCH,), 5),
        "state": slab.state,
        "ring": torch.zeros(BATCH, 4, 2 * HEADS, DIM),
        "need_weights": True,
    }


def step(given: dict[str, Any]) -> Any:
    return torch.ops.reasonalloc.coded_step(*given.values())


def copied(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()}


def spread(tensor: Tensor) -> Tensor:
    """The same numbers with gaps between them."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def shorter(tensor: Tensor) -> Tensor:
    return tensor[:, :-1].contiguous() if tensor.dim() > 1 else tensor[:-1]


Change = Callable[[Tensor], Tensor]
WRONG: list[tuple[str, Change]] = [
    ("query", Tensor.double),
    *(("sinks", change) for change in (Tensor.double, shorter, spread)),
    *(("pool", change) for change in (Tensor.char, spread, lambda pool: pool[:1])),
    *((n, c) for n in ("starts", "offsets", "lengths") for c in (Tensor.int, shorter)),
    *(("tail_keys", change) for change in (Tensor.double, spread, shorter)),
    *(("tail_values", change) for change in (Tensor.double, spread)),
    *(("tail_lengths", change) for change in (Tensor.int, spread, shorter)),
    *(("key", change) for change in (Tensor.bfloat16, shorter)),
    *(("value", change) for change in (Tensor.bfloat16, shorter)),
    *(("positions", change) for change in (Tensor.long, shorter, spread)),
    *(("seen", change) for change in (Tensor.int, shorter, spread)),
    *(("state", change) for change in (Tensor.bfloat16, shorter, spread)),
    *(("ring", change) for change in (Tensor.half, spread, lambda ring: ring[..., :-1])),
]


@pytest.mark.parametrize(("name", "change"), WRONG)
def test_a_wrong_argument_is_refused(name: str, change: Change) -> None:
    """Before anything is stored, and when a program is built."""
    given = arguments()
    step(copied(given))
    given[name] = change(given[name])
    before = copied(given)
    message = rf"^{name} cannot be handed to C\+\+"
    with pytest.raises(RuntimeError, match=message):
        step(given)
    for key, tensor in before.items():
        assert not isinstance(tensor, Tensor) or torch.equal(tensor, given[key])
    slots = given["coded_slots"] + HEADS * arguments()["tail_keys"].shape[2]
    results = torch.zeros(BATCH, 2 * HEADS, 1, DIM), torch.zeros(BATCH, slots)
    call = compiled.Call(
        torch.ops.reasonalloc.coded_step.default, tuple(given.values()), {}, results
    )
    drafts = compiled.drafts_of(call)
    if drafts is not None:
        with pytest.raises(RuntimeError, match=message):
            Program(drafts, Arena(drafts, set()))


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ([1, 1, 2, 2], "kinds are 4 numbers, not two for each of 3"),
        ([1, 1, 1, 5, 1, 1], "kinds of head 1 are 1 and 5: there are no such"),
        ([-1, 1, 1, 1, 1, 1], "kinds of head 0 are -1 and 1: there are no such"),
        ([1, 4, 1, 1, 1, 1], "kinds of head 0 are 1 and 4: there are no such"),
    ],
)
def test_wrong_kinds_are_refused(kinds: list[int], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        step({**arguments(), "kinds": kinds})


def test_fewer_slots_than_none_are_refused() -> None:
    with pytest.raises(RuntimeError, match="coded_slots are -1"):
        step({**arguments(), "coded_slots": -1})


def test_formats_of_other_vectors_are_refused() -> None:
    slab = random_coded(0, [[(1, 1)]], [("int8", "auto")], (DIM, DIM), FLOAT32)
    query = query_for(slab, 1, torch.float32)
    for dim, dtype in ((DIM + 2, torch.float32), (DIM, torch.bfloat16)):
        slab.formats = (RowFormat(Field("int8", dim, dtype), Field("auto", DIM, dtype)),)
        with pytest.raises(RuntimeError, match=r"^formats\[0\] is of keys and values of other"):
            coded.decode(query, slab, 0.3, None, False)
    odd = random_coded(0, [[(1, 1)]], [("int8", "int8")], (7, 7), FLOAT32)
    read = coded._input_of(odd)._replace(kinds=[KINDS["int4"], 1])
    with pytest.raises(RuntimeError, match="odd widths, which int4 cannot hold"):
        query = query_for(odd, 1, torch.float32)
        torch.ops.reasonalloc.coded_decode(query, *read, 0.3, 0.0, None, False)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        *(("starts", wrong, "points outside") for wrong in (-1, 10**6, 2**62)),
        *(("offsets", wrong, "points outside") for wrong in (-1, 10**6, 2**62)),
        *(("lengths", wrong, "points outside") for wrong in (-1, 10**6, 2**62)),
        ("tail_lengths", 10**6, "a run is full"),
        ("tail_lengths", -2, "points outside"),
        ("seen", -1, "points outside"),
        ("coded_slots", 2, "points outside"),
    ],
)
def test_what_points_outside_is_refused(name: str, wrong: int, message: str) -> None:
    given = arguments()
    if isinstance(given[name], Tensor):
        given[name].view(-1)[-1] = wrong
    else:
        given[name] = wrong
        slots = wrong + HEADS * given["tail_keys"].shape[2]
        given["positions"] = torch.zeros(BATCH, slots, dtype=torch.int32)
        given["state"] = torch.zeros(BATCH, slots, 2)
    with pytest.raises(RuntimeError, match=message):
        step(given)
    if name not in ("seen", "tail_lengths"):
        read = [given[field] for field in ("query", *coded.CodedInput._fields)]
        with pytest.raises(RuntimeError, match="points outside"):
            torch.ops.reasonalloc.coded_decode(*read, 0.3, 0.0, None, False)


def test_a_tail_without_room_is_full() -> None:
    slab = random_coded(0, [[(3, 4)]], [("int8", "int8")], (DIM, DIM), FLOAT32)
    query, key = query_for(slab, 1, torch.float32), torch.randn(1, 1, 1, DIM)
    new = NewToken(key, key, slab.positions, torch.zeros(1, dtype=torch.int64), None, None)
    before = slab.copy()
    with pytest.raises(RuntimeError, match="a run is full: compress before appending"):
        coded.step(query, slab, new, 0.3, None, False)
    assert torch.equal(before.tail_lengths, slab.tail_lengths)


def test_a_query_of_another_type_than_noted() -> None:
    """Under autocast: left to the backend. And the reference has no such loop."""
    slab = random_coded(0, [[(3, 1)]], [("int8", "int8")], (DIM, DIM), FLOAT32, spare=1)
    query, key = query_for(slab, 1, torch.bfloat16), torch.randn(1, 1, 1, DIM)
    token = (query, key, key, torch.zeros(1, dtype=torch.int64), slab)
    ring = torch.zeros(1, 2, 1, DIM)
    for ops in (choose_operations(native=True), TORCH):
        assert ops.step_coded(*token, ring, 0.3, None, False) is None
    assert int(slab.tail_lengths) == 1


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("need_weights", [False, True])
def test_a_compiled_step(need_weights: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One instruction, which reads what the tensors hold when it runs."""

    def refuse(call: Any) -> Any:
        raise AssertionError(f"{call.func} is left to PyTorch")

    monkeypatch.setattr(compiled, "_repetition", refuse)
    lengths = [[(40, 3), (0, 0), (300, 1)], [(7, 9), (64, 0), (0, 2)]]
    slab = random_coded(3, lengths, KINDS_OF_HEADS, (64, 48), FLOAT32, spare=4)
    query, key, value = torch.zeros(2, 6, 1, 64), torch.zeros(2, 3, 1, 64), torch.zeros(2, 3, 1, 48)
    seen, ring = torch.tensor([11, 42]), torch.zeros(2, 4, 6, 64)

    def run() -> tuple[Tensor, Tensor | None]:
        token = NewToken(key * 1.5, value + 1.0, slab.positions, seen, slab.state, ring)
        return coded.step(query.neg(), slab, token, 0.3, 2.0, need_weights)

    expected = slab.copy()
    expected.store(key, value + 1.0, seen)
    replay = compiled.compile_step(run)
    replay()
    for _ in range(3):
        seen += 1
        for tensor in (query, key, value):
            tensor.copy_(torch.randn(tensor.shape))
        expected.store(key * 1.5, value + 1.0, seen)
        compare(
            replay(), decode_coded(query.neg(), expected, 0.3, 2.0, need_weights), torch.float32
        )
    for name in ("tail_keys", "tail_values", "tail_lengths", "positions", "state"):
        assert torch.equal(getattr(slab, name), getattr(expected, name)), name
    assert torch.equal(ring[0, seen[0] % 4], -query[0, :, 0])


def test_results_of_no_memory() -> None:
    """As whoever traces sees it."""
    given = arguments()
    results = step(copied(given))
    fake = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in given.items()}
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        faked = {
            k: mode.from_tensor(given[k]) if isinstance(v, Tensor) else v for k, v in fake.items()
        }
        for theirs, own in zip(step(faked), results, strict=True):
            assert theirs.shape == own.shape and theirs.dtype == own.dtype


def test_structures_are_compared_where_the_loops_are_loaded() -> None:
    functions = build.library()
    assert functions.reasonalloc_bytes_of_attend_coded() > functions.reasonalloc_bytes_of_attend()
    for name, structure in (("attend_coded", structs.Attend), ("format", structs.Attend)):
        with pytest.raises(RuntimeError, match=r"Attend has \d+ bytes in C"):
            structs.check_size(functions, name, structure)
