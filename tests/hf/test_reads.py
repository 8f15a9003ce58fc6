"""Compiled steps never freeze a number: every way to read one is refused, or repeated rightly."""

from __future__ import annotations

import ctypes
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reasonalloc
from models import prompt, tiny
from reasonalloc.cpu_step.compiled import compile_step
from reasonalloc.errors import UnsupportedError

functional = torch.nn.functional
SIZE = 9
calls: list[None] = []
held: dict[str, Tensor] = {}


def by_address(x: Tensor) -> float:
    return float(ctypes.c_float.from_address(x.data_ptr()).value)


def by_file(x: Tensor) -> float:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    loaded: Tensor = torch.load(file)
    return float(loaded[0])


@torch.jit.script
def scripted(x: Tensor) -> float:
    numbers: list[float] = x.tolist()
    return numbers[0]


def counted(x: Tensor) -> Tensor:
    calls.append(None)
    return x * len(calls)


def from_the_host(x: Tensor) -> Tensor:
    calls.append(None)
    return x + torch.tensor([float(len(calls))])


def kept_between_steps(x: Tensor) -> Tensor:
    held["sum"] = held.get("sum", torch.zeros(SIZE)) + x
    return held["sum"] * 1.0


def returned(x: Tensor) -> tuple[Tensor, int]:
    calls.append(None)
    return x * 1.0, len(calls)


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x * x[0].item(),
    "float": lambda x: x * float(x[0]),
    "int": lambda x: x * int(x[0]),
    "complex": lambda x: x * abs(complex(x[0])),
    "bool": lambda x: x * 2 if x[0] > 2.5 else x,
    "not": lambda x: x if not x[0] - 2 else x * 2,
    "is_nonzero": lambda x: x * 2 if torch.is_nonzero(x[0] - 2) else x,
    "any": lambda x: x * 2 if any(x > 2.5) else x,
    "in": lambda x: x * 2 if 2.0 in x else x,
    "min": lambda x: x * min(x[0], x[1]),
    "index": lambda x: x * range(SIZE)[x[0].long()],
    "slice": lambda x: x * x[: x[0].long()].sum(),
    "select": lambda x: x * x[x[0].long()],
    "set": lambda x: x.clone().index_fill_(0, x[0].long(), 7.0) * int(x[0]),
    "narrow": lambda x: x * torch.narrow(x, 0, x[0].long(), 1),
    "roll": lambda x: x.cumsum(0).roll(int(x[0])),
    "arange": lambda x: x * len(torch.arange(x[0])),
    "full": lambda x: x * torch.full((2,), x[0]).sum(),
    "clamp": lambda x: x * x.clamp(x[0].item()),
    "alpha": lambda x: torch.add(x, x, alpha=x[0]),
    "format": lambda x: x * float(f"{x[0]:.3f}"),
    "str": lambda x: x * float(str(x[0])[7:-1]),
    "tolist": lambda x: x * x.tolist()[0],
    "numpy": lambda x: x * x.numpy()[0],
    "array": lambda x: x * float(np.asarray(x)[0]),
    "ufunc": lambda x: x * float(np.add(x.detach(), 1)[0]),
    "dlpack": lambda x: x * float(np.from_dlpack(x)[0]),
    "as_tensor": lambda x: x * torch.as_tensor(x.numpy()),
    "storage": lambda x: x * x.untyped_storage()[3],
    "typed storage": lambda x: x * x.storage()[0],
    "address": lambda x: x * by_address(x),
    "file": lambda x: x * by_file(x),
    "script": lambda x: x * scripted(x),
    "list": lambda x: x * torch.tensor([x[0], 1.0])[0],
    "new tensor": lambda x: x * x.new_tensor([x[0], 1.0])[0],
    "equal": lambda x: x * 2 if torch.equal(x, torch.full_like(x, 2.0)) else x,
    "allclose": lambda x: x * 2 if torch.allclose(x, torch.full_like(x, 2.0)) else x,
    "nonzero": lambda x: x * len((x > 2.5).nonzero()),
    "where": lambda x: x * len(torch.where(x > 2.5)[0]),
    "mask": lambda x: x * len(x[x > 2.5]),
    "masked_select": lambda x: x * len(x.masked_select(x > 2.5)),
    "unique": lambda x: x * len(torch.unique(x.minimum(torch.arange(9.0)))),
    "bincount": lambda x: x * len(torch.bincount(x.long())),
    "repeat_interleave": lambda x: x * len(x.repeat_interleave(x.long())),
    "one_hot": lambda x: x * functional.one_hot(x.long()).shape[1],
    "split": lambda x: x * len(torch.split(x, [int(x[0]), SIZE - int(x[0])])[0]),
    "tensor_split": lambda x: x * len(torch.tensor_split(x, x[:1].long())[0]),
    "tensor_split method": lambda x: x * len(x.tensor_split(x[:1].long())[0]),
    "counter": counted,
    "number of the host": from_the_host,
    "tensor that is kept": kept_between_steps,
    "number that is returned": returned,
}
REPEATED: dict[str, Callable[[Tensor], Any]] = {
    "count_nonzero": lambda x: x * torch.count_nonzero(x > 2.5),
    "linspace": lambda x: x * torch.linspace(x[0], 9, 3).sum(),
    "clamp": lambda x: x.clamp(x[0] + 1),
    "power": lambda x: x ** x[0],
    "gather": lambda x: x.cumsum(0).gather(0, x.long()),
    "take": lambda x: x.cumsum(0)[x.long()],
    "index_put": lambda x: x.clone().masked_fill_(x > 2.5, 7.0),
    "histogram": lambda x: x * torch.histogram(x, 3)[1].sum(),
    "isin": lambda x: x * torch.isin(x, torch.tensor([2.0, 3.0])),
    "bucketize": lambda x: x * torch.bucketize(x, torch.tensor([1.0, 2.5, 4.0])),
    "where": lambda x: torch.where(x[0] > 2.5, x, x * 2),
    "constant": lambda x: x * torch.tensor([3.0]),
    "topk": lambda x: x.cumsum(0).topk(3).values * x[0],
}


def steps(function: Callable[[Tensor], Any]) -> list[Any]:
    calls.clear()
    held.clear()
    x = torch.full((SIZE,), 2.0)
    replay = compile_step(lambda: function(x), verify=True)
    found = [replay()]
    for number in (3.0, 4.0, 2.0):
        x.fill_(number)
        found.append(replay())
    return found


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("way", REFUSED)
def test_numbers_are_not_frozen(way: str) -> None:
    with pytest.raises(UnsupportedError, match="step='eager'"):
        steps(REFUSED[way])


@pytest.mark.parametrize("way", REPEATED)
def test_what_stays_on_tensors_is_repeated(way: str) -> None:
    for found, number in zip(steps(REPEATED[way]), (2.0, 3.0, 4.0, 2.0), strict=True):
        torch.testing.assert_close(found, REPEATED[way](torch.full((SIZE,), number)))


def test_models_that_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.setitem(model.model.norm.__dict__, "forward", counted)
    calls.clear()
    with (
        reasonalloc.attach(model, budget=16, interval=8, step="compile"),
        pytest.raises(UnsupportedError, match="numbers of the host that change"),
    ):
        model.generate(prompt(20), do_sample=False, max_new_tokens=10)


def test_operations_that_return_numbers() -> None:
    """A custom operation may tell what a tensor holds."""

    @torch.library.custom_op("reasonalloc_tests::first", mutates_args=())
    def first(x: Tensor) -> float:
        return x.tolist()[0]

    with pytest.raises(UnsupportedError, match="reads numbers back"):
        steps(lambda x: x * first(x))


@pytest.mark.parametrize("way", ["float", "allclose", "list", "tolist", "dlpack"])
def test_models_that_read_are_refused(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are compiled whatever the installed transformers calls the cache."""
    model = tiny("llama")

    def reading(states: Tensor) -> Tensor:
        REFUSED[way](states[0, 0, :SIZE].cos())
        return states

    monkeypatch.setitem(model.model.norm.__dict__, "forward", reading)
    with (
        reasonalloc.attach(model, budget=16, interval=8, step="compile"),
        pytest.raises(UnsupportedError, match="step='eager'"),
    ):
        model.generate(prompt(20), do_sample=False, max_new_tokens=10)
