"""The self-test of GPUs; tests/core/test_triton.py runs this in Triton's interpreter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import recorded_graph
from reasonalloc.attention.kernels import paged
from reasonalloc.errors import UnsupportedError
from reasonalloc.integrations.vllm import runs, selftest, steps
from reasonalloc.integrations.vllm.views import CodedPool

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "group", "size"), [(128, 1, 32), (80, 7, 16)])
def test_passed(dtype: torch.dtype, dim: int, group: int, size: int) -> None:
    selftest.check(DEVICE, dtype, dim, group, size)
    selftest.check(DEVICE, dtype, dim, group, size)


def test_one_byte_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    selftest.check(DEVICE, torch.float32, 64, 2, 16, fp8=True)
    right = paged.paged_decode

    def decode(*given: Any) -> None:
        right(*given[:-1], 1.0)  # the scale of values is forgotten

    monkeypatch.setattr(selftest, "_done", set())
    monkeypatch.setattr(paged, "paged_decode", decode)
    with pytest.raises(UnsupportedError, match=r"attention differs by.*, fp8 cache"):
        selftest.check(DEVICE, torch.float32, 64, 2, 16, fp8=True)


def test_fewer_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    selftest.check(DEVICE, torch.float32, 64, 2, 16, bits=True)
    right = paged.paged_decode_coded

    def decode(query: Any, pool: Any, tables: Any, coded: Any, *rest: Any) -> None:
        right(query, pool, tables, dataclasses.replace(coded, coded=coded.coded // 2), *rest)

    monkeypatch.setattr(selftest, "_done", set())
    monkeypatch.setattr(paged, "paged_decode_coded", decode)
    with pytest.raises(UnsupportedError, match=r"attention differs by.*, fewer bits"):
        selftest.check(DEVICE, torch.float32, 64, 2, 16, bits=True)


@pytest.mark.parametrize("kinds", ["auto", "int8"])
def test_a_long_pinned_prompt_is_cut_into_more_parts(kinds: str) -> None:
    """What a run holds besides the budget counts; a short run has its parts whatever that is."""
    layout = selftest._plan(64, 2, torch.float32, kinds).layouts(16)[0]
    own = runs.Runs(layout, DEVICE, 1)
    memory = torch.zeros(8, selftest._LAYERS, selftest._HEADS, 16, 128, device=DEVICE)
    pages, pool = steps.cells(list(memory.unbind(1)))
    own.bind(pages)
    bits = None if layout.coding is None else CodedPool(layout.coding, pages, DEVICE)
    queries = runs.QueryRows(selftest._LAYERS, 4)
    query = torch.zeros(2 * selftest._HEADS, 64, device=DEVICE)

    def parts(pinned: int) -> tuple[int, ...]:
        made = steps.Steps(own, queries, pool, query, 1, 8, 0.125, 0.0, bits, pinned)
        blocks = torch.zeros(1, 4, dtype=torch.int32, device=DEVICE)
        lengths = torch.full((1,), 9, dtype=torch.int32, device=DEVICE)
        slot = own.track("one", 8, 8).slot
        return made.next([slot], [8], [0, 1], ((), ()), blocks, lengths).splits

    assert parts(0)[0] == 1 < parts(4096)[0]
    assert parts(0)[1:] == parts(4096)[1:]  # of the tail, which holds nothing of the prompt


def recorded(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """A graph's notes; noting has done the step, as the test does it before capturing."""
    replay = recorded_graph.capture(run, device)
    replay()
    return replay


@pytest.fixture
def as_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps are noted and repeated, where there is no GPU that does it."""
    monkeypatch.setattr(selftest, "_done", set())
    if DEVICE.type == "cpu":
        monkeypatch.setattr(selftest, "capture", recorded)
        monkeypatch.setattr(selftest, "_has_graphs", lambda device: True)


@pytest.mark.parametrize("bits", [False, True])
def test_steps_that_are_replayed(as_a_graph: None, bits: bool) -> None:
    selftest.check(DEVICE, torch.float32, 64, 2, 16, bits=bits)


def test_a_step_that_is_told_elsewhere(as_a_graph: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph reads where it was captured."""
    right = steps.Steps.next

    def told(self: Any, *arguments: Any) -> Any:
        self._facts = self._facts.clone()
        return right(self, *arguments)

    monkeypatch.setattr(steps.Steps, "next", told)
    with pytest.raises(UnsupportedError, match="step 2: "):
        selftest.check(DEVICE, torch.float32, 32, 4, 16)


def broken_decode(original: Callable[..., None]) -> Callable[..., None]:
    """The softmax of one head is off by a percent."""

    def decode(query: Any, pool: Any, tables: Any, layer: int, *rest: Any) -> None:
        original(query, pool, tables, layer, *rest)
        rest[3][:, -1] *= 1.01

    return decode


def forgets_shift(original: Callable[..., None]) -> Callable[..., None]:
    """Compressed runs are read as if nothing had moved."""

    def decode(query: Any, pool: Any, tables: Any, *rest: Any) -> None:
        plain = torch.full_like(tables.plain, paged.PLAIN)
        original(query, pool, dataclasses.replace(tables, plain=plain), *rest)

    return decode


def other_place(original: Callable[..., None]) -> Callable[..., None]:
    """Keys and values change places."""

    def store(key: Any, value: Any, *rest: Any) -> None:
        original(value, key, *rest)

    return store


def no_ring(original: Callable[..., None]) -> Callable[..., None]:
    """Queries are forgotten."""

    def store(*arguments: Any) -> None:
        original(*arguments[:10])

    return store


@pytest.mark.parametrize(
    ("name", "broken", "says"),
    [
        ("paged_decode", broken_decode, "attention differs by"),
        ("paged_decode", forgets_shift, "attention differs by"),
        ("paged_store", other_place, "keys and values differ"),
        ("paged_store", no_ring, "queries differ"),
    ],
)
def test_a_broken_kernel(
    monkeypatch: pytest.MonkeyPatch, name: str, broken: Callable[..., Any], says: str
) -> None:
    monkeypatch.setattr(selftest, "_done", set())
    monkeypatch.setattr(paged, name, broken(getattr(paged, name)))
    with pytest.raises(UnsupportedError, match=says) as caught:
        selftest.check(DEVICE, torch.float32, 32, 4, 16)
    assert "\n" not in str(caught.value) and torch.__version__ in str(caught.value)


def test_a_broken_compression(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device numbers pages wrongly."""
    monkeypatch.setattr(selftest, "_done", set())
    right, calls = runs.Runs.numbered, []

    def numbered(self: Any, *arguments: Any) -> Any:
        calls.append(0)
        found = right(self, *arguments)
        return found.flip(-1) if len(calls) <= 2 else found  # of the side that comes first

    monkeypatch.setattr(runs.Runs, "numbered", numbered)
    with pytest.raises(UnsupportedError, match="keys and values differ"):
        selftest.check(DEVICE, torch.float32, 32, 4, 16)
