"""The attention of GPUs, in Triton's interpreter: the same tokens as on transformers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import builder, decided, greedy, mostly, pool, random_prompts, scheduler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

import recorded_graph
from reasonalloc.cache.host import DeferredMax
from reasonalloc.config import CompressionConfig, parse_arm
from reasonalloc.integrations.vllm.budget import EngineBudget
from reasonalloc.planning.shapes import layer_shapes

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels need Triton's interpreter"
)
LENGTHS = (40, 90, 7)
SETTINGS: dict[str, Any] = {"budget": 32, "interval": 16}
OTHERS = (
    "best",
    "h2o",
    "knorm/uniform/adakv",
    "lazy_eviction/uniform/uniform",
    "random",
    "snapkv/uniform/adakv",
    "streaming_llm/pyramid/uniform",
    "tova/pyramid/adakv",
    "tri_attention/pyramid/uniform",
)


@pytest.fixture
def paged(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own Triton backend computes prompts, as it may on a GPU."""
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    from reasonalloc.integrations.vllm import backend

    monkeypatch.setattr(backend, "stock_backend", lambda *layer: TritonAttentionBackend)


@pytest.mark.parametrize(
    ("arm", "prompt"),
    [
        pytest.param("rkv/uniform/adakv", "evict", marks=pytest.mark.long),
        ("value_aware/pyramid/reasonalloc", "evict"),
        pytest.param("value_aware/uniform/adakv", "pin", marks=pytest.mark.long),
        *(pytest.param(arm, "evict", marks=pytest.mark.long) for arm in OTHERS),
    ],
)
def test_as_on_transformers(
    engine: Callable[..., Any],
    clear: Callable[..., Any],
    files: Callable[..., Any],
    paged: None,
    arm: str,
    prompt: str,
) -> None:
    settings = {**SETTINGS, "arm": arm, "prompt": prompt}
    if arm in (made := files(16)):
        settings["profile"] = made[arm]
    prompts, expected = clear(LENGTHS, 60, **settings)
    # Prompts come in pieces, beside requests that decode.
    llm = engine(settings, max_num_batched_tokens=50, max_num_seqs=4)
    assert type(builder(llm)).__name__ == "PagedBuilder"
    cache = builder(llm)._modules[0].kv_cache
    assert cache.stride(0) > 4 * cache.stride(1)  # blocks are rows of pages of all layers
    assert greedy(llm, prompts, 60) == expected
    if scheduler(llm).kv_cache_manager.enable_caching:
        assert greedy(llm, prompts[1:2], 20) == [expected[1][:20]]  # from cached blocks
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


@pytest.mark.long
@pytest.mark.parametrize("prompt", ["evict", "pin"])
def test_in_fewer_bits(engine: Callable[..., Any], model: Any, paged: None, prompt: str) -> None:
    settings = {**SETTINGS, "arm": "rkv/uniform/adakv", "kv_dtype": "int8", "prompt": prompt}
    prompts = random_prompts((*LENGTHS, 33))
    llm = engine(settings, max_num_batched_tokens=50, max_num_seqs=4)
    assert type(builder(llm)).__name__ == "PagedBuilder"
    assert mostly(greedy(llm, prompts, 60), decided(model, prompts, 60, settings)[0])
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


def test_a_cache_of_one_byte_numbers(engine: Callable[..., Any], paged: None) -> None:
    """Whoever shares a step with a request: what it stores and reads is its own."""
    prompts = random_prompts((40, 7))
    llm = engine({**SETTINGS, "arm": "rkv/uniform/adakv"}, kv_cache_dtype="fp8", max_num_seqs=2)
    together = greedy(llm, prompts, 18)
    assert together == [greedy(llm, [prompt], 18)[0] for prompt in prompts]
    assert builder(llm).runs.pages.raw.dtype == torch.uint8


def test_steps_that_are_replayed(
    engine: Callable[..., Any],
    clear: Callable[..., Any],
    paged: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in a CUDA graph: a layer's part of a step with n rows is what it was when noted first."""
    from reasonalloc.integrations.vllm.paged import PagedImpl

    settings = {**SETTINGS, "arm": "rkv/uniform/adakv"}
    prompts, expected = clear((40, 7), 24, **settings)
    right, notes, replayed = PagedImpl.forward, {}, []

    def forward(
        self: Any,
        layer: Any,
        query: Any,
        key: Any,
        value: Any,
        cache: Any,
        meta: Any,
        output: Any,
        **scales: Any,
    ) -> Any:
        if meta is None or meta.stock is not None or meta.step.tokens != meta.step.decodes:
            return right(self, layer, query, key, value, cache, meta, output)
        name = layer.layer_name, len(query)
        if name not in notes:
            given = [x.clone() for x in (query, key, value, output)]
            run = lambda: right(self, layer, *given[:3], cache, meta, given[3])  # noqa: E731
            replay = recorded_graph.capture(run, query.device)
            replay()  # noting has done this step
            notes[name] = given, replay
        else:
            given, replay = notes[name]
            for mine, theirs in zip(given, (query, key, value), strict=False):
                mine.copy_(theirs)
            replay()
            replayed.append(name)
        return output.copy_(given[3])

    monkeypatch.setattr(PagedImpl, "forward", forward)
    llm = engine(settings, max_num_seqs=2)
    assert greedy(llm, prompts, [24, 10]) == [expected[0], expected[1][:10]]
    assert greedy(llm, prompts[1:], 4) == [expected[1][:4]]  # another request, in the same graph
    assert {rows for _, rows in replayed} == {1, 2} and len(replayed) >= 4 * (22 - 2 + 2)


def test_a_graph_of_padded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeferredMax, "get", lambda self: 48)
    worker = Worker(make_plan("rkv/uniform/adakv", 2), monkeypatch)
    worker.blocks = torch.zeros(4, 32, dtype=torch.int32)
    lengths = torch.zeros(4, dtype=torch.int32)
    captured = worker.builder.build_for_cudagraph_capture(worker.common([1] * 4, 4, lengths))
    assert (captured.step.tokens, captured.step.decodes) == (4, 4)
    worker.builder.begin({"a", "b"}, ["a", "b"], [40, 64], [40, 64], [1, 1], [32, 32])
    step = worker.builder.build(0, worker.common([1, 1, 0, 0], 4, lengths)).step
    assert (step.tokens, step.decodes, step.splits) == (4, 4, captured.step.splits)
    assert step.blocks.data_ptr() == captured.step.blocks.data_ptr()
    worker.blocks = worker.blocks.clone()
    worker.builder.begin({"a", "b"}, ["a", "b"], [40, 64], [41, 65], [1, 1], [32, 32])
    with pytest.raises(RuntimeError, match=r"moved its tables .* a CUDA graph of 4 requests"):
        worker.builder.build(0, worker.common([1, 1, 0, 0], 4, lengths))


@pytest.mark.parametrize(
    ("name", "arm"),
    [
        pytest.param("gemma3", "rkv/uniform/adakv", marks=pytest.mark.long),
        ("gpt_oss", "value_aware/uniform/adakv"),
    ],
)
def test_windows_and_sinks(
    engine: Callable[..., Any],
    windowed: Callable[..., Any],
    paged: None,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    arm: str,
) -> None:
    """Layers with a window keep vLLM's own backend, and its blocks lie among ours."""
    from vllm.model_executor.layers.attention import attention
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    monkeypatch.setattr(attention, "get_attn_backend", lambda *a, **b: TritonAttentionBackend)
    # vLLM's kernel that stores tokens asks what the GPU can do.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    settings = {**SETTINGS, "arm": arm}
    kinds = ["sliding_attention", "full_attention"]
    model = windowed(name, layer_types=kinds, num_hidden_layers=2)
    prompts, expected = model.clear((50, 7), 44, **settings)
    llm = engine(settings, model=model.folder, max_num_batched_tokens=32, max_num_seqs=2)
    layers = builder(llm)
    assert type(layers).__name__ == "PagedBuilder"
    assert (layers.sinks(0) is None) == (name != "gpt_oss")
    assert greedy(llm, prompts, 44) == expected
    assert pool(llm).get_num_free_blocks() == pool(llm).num_gpu_blocks - 1


class Count(TorchDispatchMode):
    """Counts operations of a device that are no mere views."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.namespace in ("aten", "reasonalloc") and not func.is_view
        return func(*args, **(kwargs or {}))


def make_plan(arm: str, layers: int, bits: bool = False) -> EngineBudget:
    parsed = parse_arm(arm)
    assert parsed is not None
    coded = {"kv_dtype": "int8"} if bits else {}
    model = LlamaConfig(
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    config = CompressionConfig(24, parsed, interval=8, window=4, n_sink=1, **coded)  # type: ignore[arg-type]
    return EngineBudget(config, layer_shapes(model, "tiny"), model, "tiny")


class Worker:
    """Two requests through builder and attention, on tensors without data."""

    def __init__(self, plan: EngineBudget, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

        from reasonalloc.integrations.vllm import builder as builders
        from reasonalloc.integrations.vllm.paged import paged_backend

        class Stock(TritonAttentionBackend):
            """Computes no prompts."""

            @staticmethod
            def get_builder_cls() -> Any:
                return lambda *given: SimpleNamespace(build=lambda *common: None)

        monkeypatch.setattr(builders, "find_budget", lambda config: plan)
        backend = paged_backend(plan, Stock)
        self.impl = backend.get_impl_cls()(4, 32, 0.2, 2, None, None, "auto")
        caches = torch.zeros(64, len(plan.totals), 2, 16, 64).unbind(1)
        self.modules = {
            str(i): SimpleNamespace(impl=self.impl, kv_cache=cache, layer_name=str(i))
            for i, cache in enumerate(caches)
        }
        vllm_config: Any = SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=128),
            model_config=SimpleNamespace(dtype=torch.float32, max_model_len=512),
            compilation_config=SimpleNamespace(static_forward_context=self.modules),
        )
        spec: Any = SimpleNamespace(block_size=16)
        self.builder = backend.get_builder_cls()(
            spec, list(self.modules), vllm_config, torch.device("cpu")
        )
        self.blocks = torch.zeros(2, 32, dtype=torch.int32)

    def common(self, new: list[int], tokens: int, lengths: torch.Tensor) -> Any:
        """vLLM's metadata of rows with ``new`` tokens, in tensors of ``tokens`` ones."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        starts = list(itertools.accumulate(new, initial=0))
        return CommonAttentionMetadata(
            query_start_loc=torch.zeros(len(starts), dtype=torch.int32),
            # Known on the host.
            query_start_loc_cpu=Listed(starts),  # type: ignore[arg-type]
            seq_lens=lengths,
            num_reqs=len(new),
            num_actual_tokens=tokens,
            max_query_len=max(new),
            max_seq_len=512,
            block_table_tensor=self.blocks,
            slot_mapping=torch.zeros(tokens, dtype=torch.int64),
        )

    def step(self, before: list[int], new: list[int]) -> int:
        """Operations of a step, without what a boundary does."""
        tokens = sum(new)
        common = self.common(new, tokens, torch.zeros(2, dtype=torch.int32))
        query, out = torch.zeros(2, tokens, 4, 32)
        key, value = torch.zeros(2, tokens, 2, 32)
        with Count() as count:
            self.builder.begin({"a", "b"}, ["a", "b"], [40, 64], before, new, [32, 32])
            meta = self.builder.build(0, common)
            for module in self.modules.values():
                self.impl.forward(module, query, key, value, module.kv_cache, meta, out)
        self.builder.finish()
        return count.number


class Listed(list[int]):
    """Numbers that the host knows, as vLLM's tensors of the CPU hold them."""

    def tolist(self) -> list[int]:
        return list(self)

    def __getitem__(self, index: Any) -> Any:
        return torch.zeros(3, dtype=torch.int32)[index]


@pytest.mark.parametrize(
    ("arm", "own", "bits"),
    [
        ("rkv/uniform/adakv", 2, False),
        ("value_aware/pyramid/adakv", 40, False),
        ("value_aware/pyramid/adakv", 40, True),
    ],
)
def test_a_step_asks_nothing(
    arm: str, own: int, bits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One copy to the device, two operators per layer, and nothing is read back."""
    monkeypatch.setattr(DeferredMax, "get", lambda self: 48)
    counts = []
    for layers in (2, 6):
        plan = make_plan(arm, layers, bits)
        with FakeTensorMode():
            worker = Worker(plan, monkeypatch)
            worker.step([0, 0], [40, 64])
            counts.append({worker.step([40 + n, 64 + n], [1, 1]) for n in range(18)})
            assert worker.builder.runs._tracked["a"].longest is not None
    few, many = counts
    assert len(few) == len(many) == 1  # the same in every step
    assert max(many) - max(few) == 2 * 4
    assert max(few) - 2 * 2 <= own
