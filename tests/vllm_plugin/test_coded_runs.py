"""Runs that begin with tokens in fewer bits, against the same requests alone in coded slabs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import made_costs
from examples import examples
from pooled_requests import HEADS, LAYERS, MODEL, SHAPES, WIDTH, Request, drive, make_plan
from reasonalloc.calibrated.demand import config_hash
from reasonalloc.config import CompressionConfig
from reasonalloc.integrations.vllm import compression, moves
from reasonalloc.integrations.vllm.budget import make_budget
from reasonalloc.integrations.vllm.settings import as_json, find_settings
from reasonalloc.ops.page_rows import PageRows
from reasonalloc.planning.budget import BudgetPlan

ARMS = [
    "streaming_llm/uniform/uniform",
    "rkv/uniform/reasonalloc",
    "random/pyramid/uniform",
    "knorm/uniform/adakv",
    "value_aware/uniform/uniform",
]
KINDS = ["int8", "int4", "int4h", "fp8", "int8:int4", "auto:int8", "int8:auto"]


@given(
    st.sampled_from(ARMS),
    st.sampled_from(KINDS),
    st.integers(12, 24),
    st.integers(4, 12),
    st.sampled_from([1, 4, 8]),
    SHAPES,
    st.integers(0, 3),
    st.sampled_from(["evict", "pin"]),
    st.integers(0, 100),
)
@examples(25, suppress_health_check=[HealthCheck.too_slow])
def test_the_pool_keeps_what_slabs_keep(
    arm: str,
    kind: str,
    budget: int,
    interval: int,
    block_size: int,
    shapes: list[tuple[int, int, int]],
    n_sink: int,
    prompt: str,
    seed: int,
) -> None:
    more = {"n_sink": n_sink, "kv_dtype": kind, "prompt": prompt, "seed": seed}
    plan = make_plan(arm, budget, interval, **more)
    requests = [Request(str(i), *shape) for i, shape in enumerate(shapes)]
    drive(plan, block_size, requests, seed)


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In several formats, so that heads of one layer get different ones."""
    path = tmp_path_factory.mktemp("costs") / "costs.json"
    made = made_costs.make(LAYERS, HEADS, fingerprint=config_hash(MODEL.to_dict()))
    made_costs.in_formats(made).save(path)
    return path


@pytest.mark.parametrize("policy", ["rkv", "value_aware"])
@pytest.mark.parametrize("block_size", [2, 8])
@pytest.mark.parametrize("prompt", ["evict", "pin"])
def test_bits_planned_per_head(costs: Path, policy: str, block_size: int, prompt: str) -> None:
    arm = f"{policy}/cost(bits=planned)/planned"
    plan = make_plan(arm, 16, 8, profile=str(costs), n_sink=1, prompt=prompt)
    assert plan.formats is not None
    assert len({kind for layer in plan.formats for _, kind in layer}) > 1
    requests = [Request("a", 90, 0, 90), Request("b", 9, 3, 140), Request("c", 1, 5, 30)]
    drive(plan, block_size, requests, 0)


@pytest.mark.parametrize("text", ["24KiB", "25%@400"])
@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_budgets_in_bytes(text: str, kind: str) -> None:
    """As many tokens as on transformers, read back from JSON."""
    given = CompressionConfig(text, interval=8, window=4, kv_dtype=kind)  # type: ignore[arg-type]
    config = find_settings({"reasonalloc": as_json(given)})
    assert config is not None and config.size == given.size
    plan = make_budget(config, "tiny", MODEL, 1)
    alike = BudgetPlan(given, plan.shapes, MODEL, "tiny")
    assert plan.config.budget == alike.config.budget > 12
    allowed = 24 << 10 if text == "24KiB" else plan.full_bytes(1, 100, 4)
    assert plan.memory(1).slab_bytes <= allowed
    pages = sum(plan.layouts(4)[0].pages())
    assert pages * 4 * 2 * WIDTH * 4 < 1.6 * allowed  # ends of pages, and what lies beside tokens


def test_long_pinned_prompts_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short requests are not padded to long ones, and few heads are coded at a time."""
    plan = make_plan("value_aware/uniform/adakv", 16, 8, kv_dtype="int8:int4", prompt="pin")
    shapes = [(150, 0, 20), (4, 0, 20), (7, 0, 20), (1, 0, 20), (160, 0, 20)]
    requests = [Request(str(i), *shape) for i, shape in enumerate(shapes)]
    number = 2 * WIDTH * 4  # bytes of a token of a head
    monkeypatch.setattr(compression, "_KEPT_BYTES", 2 * LAYERS * HEADS * 180 * number)
    monkeypatch.setattr(moves, "_ENCODED_BYTES", 2 * 160 * number)
    chunks, sizes = list[list[int]](), list[int]()
    compress, encode = compression.PoolCompressor._compress, PageRows.encode

    def watched(self: Any, chunk: Any, blocks: Any) -> None:
        chunks.append(sorted({row.due.request.start for row in chunk}))
        compress(self, chunk, blocks)

    def counted(self: PageRows, keys: Any, *more: Any) -> Any:
        sizes.append(keys[..., 0].numel())
        return encode(self, keys, *more)

    monkeypatch.setattr(compression.PoolCompressor, "_compress", watched)
    monkeypatch.setattr(PageRows, "encode", counted)
    drive(plan, 8, requests, 0)
    assert [1, 4, 7] in chunks and all(len(chunk) < 4 for chunk in chunks)
    assert all(max(chunk) < 10 or min(chunk) > 100 for chunk in chunks)
    assert max(sizes) <= 2 * 160
