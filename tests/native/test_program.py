"""Programs of C++ loops against the PyTorch operations that they were noted from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from examples import examples
from reasonalloc.cpu_step import compiled
from reasonalloc.cpu_step.products import MOST_ROWS, most_rows
from reasonalloc.cpu_step.program import Program, collapsed
from reasonalloc.cpu_step.structs import Operation
from reasonalloc.errors import UnsupportedError

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
LINEAR = torch.nn.functional.linear
DTYPES = st.sampled_from(list(TOLERANCE))


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def repeated(function: Callable[..., Any], *inputs: Tensor) -> list[tuple[Any, Any]]:
    """(by the program, by PyTorch) for other contents of the inputs, three times."""
    replay = compiled.compile_step(lambda: function(*inputs))
    replay()
    found = []
    for _ in range(3):
        kept = []
        for tensor in inputs:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape))
            kept.append(tensor.clone(memory_format=torch.preserve_format))
        got = replay()
        after = [t.clone(memory_format=torch.preserve_format) for t in inputs]
        expected = function(*kept)
        found.append((got, expected))
        for mine, theirs in zip(after, kept, strict=True):  # what is changed in place
            torch.testing.assert_close(mine, theirs, **close(mine.dtype))
    return found


def close(dtype: torch.dtype) -> dict[str, float]:
    tolerance = TOLERANCE.get(dtype, 0.0)
    return {"rtol": tolerance, "atol": tolerance}


def check(function: Callable[..., Any], *inputs: Tensor, terms: int = 1) -> None:
    for got, expected in repeated(function, *inputs):
        limits = close(expected.dtype)
        limits["atol"] *= terms**0.5
        torch.testing.assert_close(got, expected, **limits)


@pytest.fixture
def no_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be left to PyTorch."""

    def refuse(call: Any) -> Any:
        raise AssertionError(f"{call.func} is left to PyTorch")

    monkeypatch.setattr(compiled, "_repetition", refuse)


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": lambda x: -x,
    "cos": torch.cos,
    "sin": torch.sin,
    "rsqrt": lambda x: (x * x + 1.0).rsqrt(),
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
    "exp": torch.exp,
    "relu": torch.relu,
    "square": lambda x: x**2,
    "cube": lambda x: x**3,
    "half": lambda x: x.half() + 1,
    "double it": lambda x: x + x,
    "scaled": lambda x: torch.add(x, 3.0, alpha=2),
    "mean": lambda x: x.mean(-1, keepdim=True) * 1.0,
    "sum": lambda x: x.sum(-1) + 0.0,
    "sum of one": lambda x: x[..., None].sum(-1) + 0.0,
    "turned": lambda x: x.transpose(0, -1).contiguous() * 2.0,
    "halves": lambda x: torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1),
}
SHAPES = st.one_of(
    st.lists(st.integers(1, 6), min_size=2, max_size=4),
    st.sampled_from([[1, 1, 576], [16, 1, 576], [3, 700], [2, 3, 1, 1025], [1, 70000], [5, 1]]),
)


@pytest.mark.usefixtures("no_repetitions")
@pytest.mark.parametrize("name", UNARY)
@given(shape=SHAPES, dtype=DTYPES, seed=st.integers(0, 3))
@examples(25)
def test_one_tensor(name: str, shape: list[int], dtype: torch.dtype, seed: int) -> None:
    x = torch.randn(shape, dtype=dtype)
    if seed == 1:  # with gaps
        x = torch.randn([*shape[:-1], 2 * shape[-1]]).to(dtype)[..., ::2]
    if seed == 2:
        x = torch.randn(shape[::-1]).to(dtype).permute(*reversed(range(len(shape))))
    if name == "cube" and dtype is not torch.float32:
        return  # rounded at other places
    check(UNARY[name], x, terms=shape[-1] if name == "sum" else 1)


@pytest.mark.usefixtures("no_repetitions")
@given(
    shape=SHAPES,
    dtypes=st.tuples(DTYPES, DTYPES),
    narrow=st.sets(st.integers(0, 3)),
    name=st.sampled_from(["add", "sub", "mul", "div"]),
)
@examples(60)
def test_two_tensors(
    shape: list[int], dtypes: tuple[torch.dtype, torch.dtype], narrow: set[int], name: str
) -> None:
    other = [1 if i in narrow else n for i, n in enumerate(shape)]
    x, y = torch.randn(shape, dtype=dtypes[0]), torch.randn(other, dtype=dtypes[1])
    function = getattr(torch, name)

    def both(x: Tensor, y: Tensor) -> Tensor:
        z = y.abs() + 0.5 if name == "div" else y
        return function(x, z)

    if name == "div":
        both = lambda x, y: x / (y * y + 0.5)  # noqa: E731
    check(both, x, y)


@pytest.mark.usefixtures("no_repetitions")
@given(
    rows=st.one_of(st.integers(1, MOST_ROWS), st.just(1)),
    width=st.one_of(st.integers(1, 90), st.sampled_from([64, 576])),
    outputs=st.integers(1, 70),
    dtype=DTYPES,
    bias=st.booleans(),
)
@examples(80)
def test_products(rows: int, width: int, outputs: int, dtype: torch.dtype, bias: bool) -> None:
    x = torch.randn(min(rows, most_rows(dtype)), 1, width, dtype=dtype)
    weight = torch.randn(outputs, width, dtype=dtype)
    if bias:
        check(LINEAR, x, weight, torch.randn(outputs, dtype=dtype), terms=width)
    else:
        check(LINEAR, x, weight, terms=width)


@pytest.mark.usefixtures("no_repetitions")
@pytest.mark.parametrize("rows", [3, 7, 20])
def test_products_of_the_same_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They share a panel until the rows change."""
    drafted: list[Operation] = []

    class Watched(Program):
        def __init__(self, drafts: Any, arena: Any) -> None:
            super().__init__(drafts, arena)
            drafted[:] = [draft.operation for draft in drafts]

    def several(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        y = x * 1.5
        before = LINEAR(y, w) + LINEAR(y, v)
        between = LINEAR(y[1:], w).sum(-1).sum(0)
        y.mul_(0.5)
        return before - LINEAR(y, w) * LINEAR(y, v) + between

    monkeypatch.setattr(compiled, "Program", Watched)
    inputs = torch.randn(rows, 40), torch.randn(33, 40), torch.randn(33, 40)
    check(several, *inputs, terms=40 * 40)
    assert drafted.count(Operation.PRODUCT) == 5
    assert drafted.count(Operation.PANEL) == (0 if rows == 3 else 3)


def test_many_rows_are_pytorchs() -> None:
    x, weight = torch.randn(MOST_ROWS + 1, 8), torch.randn(5, 8)
    check(lambda x, w: torch.nn.functional.linear(x, w) + 1.0, x, weight)
    check(torch.nn.functional.linear, x, weight, torch.randn(5))


@pytest.mark.usefixtures("no_repetitions")
@given(
    batch=st.sampled_from([1, 2, 5, 16]),
    width=st.sampled_from([16, 48, 200]),
    steps=st.lists(st.integers(0, 8), min_size=1, max_size=25),
    seed=st.integers(0, 10**6),
)
@examples(60)
def test_whatever_meets_whatever(batch: int, width: int, steps: list[int], seed: int) -> None:
    """Chains over a few tensors: places that are used again, and threads that must wait."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(width, width, generator=generator) / width**0.5 for _ in range(3)]
    picks = torch.randint(0, 10**6, (len(steps), 2), generator=generator).tolist()
    state = torch.zeros(batch, 1, width)

    def function(x: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        known = [x]
        for step, (first, second) in zip(steps, picks, strict=True):
            a, b = known[first % len(known)], known[second % len(known)]
            match step:
                case 0 | 1:
                    made = torch.nn.functional.linear(a, weights[second % 3])
                case 2:
                    made = torch.nn.functional.silu(a) * b
                case 3:
                    made = a * torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + 1e-6)
                case 4:
                    half = width // 2
                    made = torch.cat([-a[..., half:], b[..., :half]], dim=-1)
                case 5:
                    made = a.view(batch, 4, width // 4).transpose(0, 1).contiguous()
                    made = made.transpose(0, 1).reshape(batch, 1, width) + b
                case 6:
                    state.add_(a).mul_(0.5)
                    made = state + b
                case 7:
                    made = a.mean(-1, keepdim=True) - b
                case _:
                    made = torch.tanh(a) + 0.1
            known.append(made)
        return known[-1], known[len(known) // 2]

    for got, expected in repeated(function, torch.randn(batch, 1, width), state):
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_what_is_not_known_is_repeated() -> None:
    def function(x: Tensor, places: Tensor) -> Tensor:
        chosen = x.softmax(-1).topk(3, dim=-1)
        y = torch.where(chosen.values > 0.1, chosen.indices, 0).double().sqrt()
        return (y.float() + x[..., :3]).cumsum(0) + places.remainder(3)[:, None]

    check(function, torch.randn(4, 9), torch.arange(4))


def test_results_are_new() -> None:
    x = torch.ones(3)
    replay = compiled.compile_step(lambda: x * 2)
    first = replay()
    x.fill_(9)
    second = replay()
    x.fill_(5)
    assert replay().tolist() == [10.0] * 3
    assert first.tolist() == [2.0] * 3 and second.tolist() == [18.0] * 3


def test_integers_are_rounded_as_pytorch_rounds_them() -> None:
    x, y = torch.ones(20, dtype=torch.bfloat16), torch.arange(250, 270)
    replay = compiled.compile_step(lambda: x * y)
    replay()
    x.fill_(3)
    assert torch.equal(replay(), x * y)


def test_what_cannot_be_repeated_is_refused() -> None:
    x, mask = torch.arange(4.0), torch.tensor([True, True, True, False])
    replay = compiled.compile_step(lambda: x[mask] + 1)
    replay()
    mask[1:] = False
    with pytest.raises(UnsupportedError, match="the shape of a result changes"):
        replay()
    for read in (Tensor.tolist, Tensor.numpy, Tensor.item):
        with pytest.raises(UnsupportedError, match="reads numbers back"):
            compiled.compile_step(lambda read=read: read(x.sum()))


def test_numbers_that_count() -> None:
    counts, mask = torch.tensor([3, 2**40]), torch.tensor([True, False])

    def function(counts: Tensor, mask: Tensor, x: Tensor) -> Tensor:
        counts += 2
        return counts.float() + x + mask.float()

    replay = compiled.compile_step(lambda: function(counts, mask, torch.ones(2)))
    for times in range(1, 4):
        got = replay()
        assert counts.tolist() == [3 + 2 * times, 2**40 + 2 * times]
        torch.testing.assert_close(got, counts.float() + torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_of_an_embedding(dtype: torch.dtype) -> None:
    weight, ids = torch.randn(11, 6, dtype=dtype), torch.tensor([[3], [10]])
    replay = compiled.compile_step(lambda: torch.nn.functional.embedding(ids, weight) * 1.0)
    replay()
    ids.copy_(torch.tensor([[0], [7]]))
    assert torch.equal(replay(), weight[ids])
    ids[1] = 11
    with pytest.raises(IndexError, match="not in the model's vocabulary"):
        replay()


def test_not_a_number_stays_one() -> None:
    x = torch.randn(1, 40)
    replay = compiled.compile_step(lambda: torch.relu(torch.nn.functional.silu(x)) * 2.0)
    replay()
    x[0, 3], x[0, 39], x[0, 5] = torch.nan, torch.inf, -torch.inf
    got = replay()
    assert bool(got[0, 3].isnan()) and got[0, 39] == torch.inf and not got[0, 6:39].isnan().any()


def test_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    arenas = []
    monkeypatch.setattr(
        compiled, "Program", lambda drafts, arena: arenas.append(arena) or Program(drafts, arena)
    )
    x = torch.randn(1, 1000)

    def function() -> Tensor:
        y = x
        for _ in range(50):
            y = torch.tanh(y) * 2.0
        return y

    replay = compiled.compile_step(function)
    replay()
    torch.testing.assert_close(replay(), function())
    assert arenas[0]._memory.numel() < 4 * 4096


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.permutations(range(5)),
    st.sets(st.integers(0, 4)),
)
def test_fewer_dimensions(shape: list[int], order: list[int], broadcast: set[int]) -> None:
    order = [d for d in order if d < len(shape)]
    a = torch.arange(torch.Size(shape).numel()).view([shape[d] for d in order])
    a = a.permute([order.index(d) for d in range(len(shape))])
    b = a[tuple(slice(0, 1) if d in broadcast else slice(None) for d in range(len(shape)))]
    b = b.expand(shape)
    found = collapsed(shape, [a.stride(), b.stride()], 5)
    assert found is not None
    sizes, (of_a, of_b) = found
    base = torch.arange(torch.Size(shape).numel())
    pairs = zip(
        base.as_strided(sizes, of_a).flatten().tolist(),
        base.as_strided(sizes, of_b).flatten().tolist(),
        strict=True,
    )
    assert sorted(pairs) == sorted(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
