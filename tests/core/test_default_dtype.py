"""PyTorch's default type and device decide nothing: whoever sets them gets the same tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import made_costs
import made_statistics
import reasonalloc
from models import prompt, tiny
from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.allocators.layer import LAYER_ALLOCATORS
from reasonalloc.attention import choose_backend
from reasonalloc.calibrated.demand import DemandProfile, config_hash
from reasonalloc.config import CompressionConfig
from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.recorder import Recorder
from reasonalloc.planning.shapes import text_config
from reasonalloc.policies import POLICIES
from reference import NAMED_BY_A_FILE
from tensor_factories import unclear_calls, unclear_in

OTHERS = (torch.bfloat16, torch.float16, torch.float64)
ALL = sorted(set(POLICIES.entries()) - NAMED_BY_A_FILE)
SOURCES = Path(reasonalloc.__file__).parent


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(scope="module")
def files(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of every kind that policies and allocators read, by what they say they read."""
    folder = tmp_path_factory.mktemp("files")
    found = {kind: folder / f"{kind} file" for kind in ("statistics", "cost profile", "profile")}
    made_statistics.of_model(model).save(found["statistics"])
    made_costs.of_model(model).save(found["cost profile"])
    demand = [30.0, 10.0, 20.0]
    DemandProfile(
        model_id="tiny",
        config_hash=config_hash(text_config(model).to_dict()),
        rho=0.9,
        steps=1,
        prompt_hashes=["a"],
        demand_mean=demand,
        demand_max=demand,
        curves=[demand],
    ).save(found["profile"])
    return found


def test_every_new_tensor_has_a_type_and_a_device() -> None:
    assert unclear_calls(SOURCES) == []


@pytest.mark.parametrize(
    ("call", "missing"),
    [
        ("zeros(3)", "no dtype and no device"),
        ("zeros(3, device=d)", "no dtype"),
        ("tensor([], dtype=t)", "no device"),
        ("full((2,), 1, device=d)", "no dtype"),
        ("arange(n)", "no device"),
        ("arange(0, n / 2, device=d)", "no dtype"),
        ("arange(0.5, device=d)", "no dtype"),
        ("where(x > 0, 0.5 ** 2, -1.0)", "no tensor to take the type from"),
        ("Tensor(3)", "no dtype and no device"),
        ("arange(n // 2, device=d)", ""),
        ("where(x > 0, x, 1.0)", ""),
        ("zeros(2, **fresh)", ""),
        ("zeros_like(x)", ""),
    ],
)
def test_what_is_missing_is_found(call: str, missing: str) -> None:
    name = call.partition("(")[0]
    expected = [(2, f"torch.{name}: {missing}")] if missing else []
    assert list(unclear_in(f"import torch\nx = torch.{call}\n")) == expected


@pytest.mark.parametrize("step", ["eager", "static", "compile"])
@pytest.mark.parametrize("policy", [*ALL, *sorted(NAMED_BY_A_FILE)])
def test_the_same_tokens(policy: str, step: Any, model: Any, files: dict[str, Path]) -> None:
    expected = written(model, policy, step, files)
    for dtype in OTHERS:
        torch.set_default_dtype(dtype)
        assert torch.equal(written(model, policy, step, files), expected), dtype


def written(model: Any, policy: str, step: Any, files: dict[str, Path]) -> torch.Tensor:
    """Tokens of one run, whose storage is as it was planned."""
    reads = getattr(POLICIES.entries()[policy].cls, "reads", None)
    arm = {"profile": files[reads]} if reads else {}
    with reasonalloc.attach(
        model, budget=16, interval=8, policy=policy, heads="adakv", step=step, **arm
    ) as attached:
        out = model.generate(
            prompt(25, 2), max_new_tokens=45, do_sample=False, return_dict_in_generate=True
        )
        cache = out.past_key_values
        assert attached.recorder is not None and attached.recorder.compressions > 0
        assert cache.bookkeeping_bytes == attached.plan(2).bookkeeping_bytes
    for layer in cache.layers:
        state = layer.compressor.slab.state
        assert state is None or state.dtype is torch.float32
    return out.sequences


class NothingBy(TorchDispatchMode):
    """Refuses results of a type and on a device that no input has: they come from the defaults."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._unwanted = dtype, device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                assert tensor.dtype is not self._unwanted[0], f"{func} took the default type"
                assert tensor.device.type != self._unwanted[1], f"{func} took the default device"
        return result


@pytest.mark.parametrize("attention", ["sdpa", "cpp", "eager"])
@pytest.mark.parametrize("policy", ALL)
def test_no_operation_takes_a_default(policy: str, attention: str) -> None:
    """In a layer alone; types that come of operations on integers and plain numbers as well."""
    heads = {"sdpa": "adakv", "cpp": "reasonalloc", "eager": "planned"}[attention]
    found = []
    ready = made_statistics.ready(policy, 0, 6, 16)
    for others in (False, True):
        layer = new_layer(ready, heads, attention)
        if others:
            torch.set_default_dtype(torch.float16)
            torch.set_default_device("meta")
            with NothingBy(torch.float16, "meta"):
                found.append(run(layer))
        else:
            found.append(run(layer))
    assert torch.equal(*found)


def new_layer(policy: Any, heads: str, attention: str) -> LayerCompressor:
    """A layer of three KV heads."""
    return LayerCompressor(
        0,
        3 * 20,
        CompressionConfig(budget=20, interval=8, n_sink=1),
        policy,
        HEAD_ALLOCATORS.create(heads),
        choose_backend(attention, torch.device("cpu"), torch.float32),
        Recorder(level="tokens"),
        planned=[14, 20, 26] if heads == "planned" else None,
    )


def run(layer: LayerCompressor) -> torch.Tensor:
    """Outputs of a padded prompt, plain steps, a chunk, and static steps."""
    generator = torch.Generator().manual_seed(0)

    def forward(columns: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        query, key, value = (
            torch.randn(2, heads, columns, 16, generator=generator, device="cpu", dtype=dtype)
            for heads in (6, 3, 3)
        )
        return layer.forward(query, key, value, mask, 0.25)

    dtype = torch.float32
    real = torch.arange(40, device="cpu") >= torch.tensor([0, 7], device="cpu")[:, None]
    causal = torch.ones(40, 40, dtype=torch.bool, device="cpu").tril()
    outs = [forward(40, causal & real[:, None, None])]
    outs += [forward(1) for _ in range(12)]
    outs.append(forward(5))
    layer.fix()
    layer.static = True
    for _ in range(12):
        outs.append(forward(1))
        layer.advance()
    return torch.cat(outs, dim=2)


@pytest.mark.parametrize("layers", sorted(LAYER_ALLOCATORS.entries()))
def test_plans_are_the_same(layers: str, model: Any, files: dict[str, Path]) -> None:
    cls = LAYER_ALLOCATORS.entries()[layers].cls
    profile = files[cls.reads] if hasattr(cls, "path") else None
    heads = "planned" if layers == "cost" else "uniform"
    found = []
    for others in (False, True):
        if others:
            torch.set_default_dtype(torch.float16)
            torch.set_default_device("meta")
        with reasonalloc.attach(
            model, budget=20, interval=8, layers=layers, heads=heads, profile=profile
        ) as attached:
            found.append((attached.totals, attached.planned, attached.plan(2)))
    assert found[0] == found[1]


@pytest.mark.parametrize("step", ["eager", "static", "compile"])
def test_generation_with_another_default_device(step: Any, model: Any) -> None:
    ids = prompt(25, 2)
    mask = torch.ones_like(ids)
    found = []
    for device in (None, "meta"):
        torch.set_default_device(device)
        with reasonalloc.attach(model, budget=16, interval=8, arm="h2o", step=step):
            out = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
        found.append(out)
    assert torch.equal(*found)
