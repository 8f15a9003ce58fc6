"""What an engine under a budget cannot do is refused before the model is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import greedy, random_prompts, worker

import made_costs
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.integrations.vllm import checks, request_wrappers, worker_wrappers
from reasonalloc.integrations.vllm.budget import divide_layers
from reasonalloc.integrations.vllm.patch import Patch
from reasonalloc.integrations.vllm.patches import PATCHES
from reasonalloc.integrations.vllm.windows import Groups
from reasonalloc.planning.memory import LayerShape


@pytest.mark.parametrize(
    ("settings", "arguments", "says"),
    [
        ({"arm": "h2o"}, {"enable_prefix_caching": True}, "--enable-prefix-caching.*h2o"),
        (
            {},
            {"kv_cache_dtype": "fp8_e5m2"},
            "dtype fp8_e5m2 .*: use auto, float32, fp8 or",
        ),
        ({}, {"kv_cache_dtype_skip_layers": ["0"]}, "--kv-cache-dtype-skip-layers"),
        (
            {},
            {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
            "--pipeline-parallel-size.*V1 model runner has no stages on a CPU",
        ),
        ({}, {"hf_overrides": {"is_mm_prefix_lm": True}}, "--language-model-only"),
        ({}, {"ubatch_size": 2, "all2all_backend": "deepep_low_latency"}, "--ubatch-size"),
        ({"prompt": "protect"}, {}, "prompt='protect'"),
        ({"budget": "1MiB"}, {"kv_cache_dtype": "fp8"}, "budget='1MiB' counts .*-dtype fp8"),
        ({"kv_dtype": "int8"}, {"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8.*kv_dtype='int8'"),
        ({"arm": "reasonalloc"}, {}, "needs a profile"),
        ({"budgett": 3}, {}, "budget"),
        ({"budget": 4}, {}, "cannot hold the observation window"),
    ],
)
def test_refused(
    engine: Callable[..., Any], settings: dict[str, Any], arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises((UsageError, UnsupportedError), match=says):
        engine({"budget": 64, **settings}, **arguments)


@pytest.mark.parametrize(
    ("parallel", "engines"),
    [
        ({"data_parallel_size": 8}, 8),
        ({"data_parallel_size": 8, "data_parallel_rank_local": 3}, 1),
        ({"data_parallel_size": 8, "local_engines_only": True, "data_parallel_size_local": 2}, 2),
    ],
)
def test_engines_whose_blocks_are_summed_up(parallel: dict[str, Any], engines: int) -> None:
    plain = {"data_parallel_rank_local": None, "local_engines_only": False}
    assert request_wrappers._engines(SimpleNamespace(**plain | parallel)) == engines


@pytest.mark.parametrize(("given", "left"), [(None, 900), (1000, 1000)])
def test_memory_beside_the_cache(
    monkeypatch: pytest.MonkeyPatch, given: int | None, left: int
) -> None:
    """It is left where vLLM sets the size of the cache, too, as a plan of an earlier start does."""
    plan = SimpleNamespace(
        cache_bytes=lambda available, requests, *rest: max(available - requests, 0), stages=None
    )
    monkeypatch.setattr(worker_wrappers, "find_budget", lambda config: plan)

    def found(self: Any) -> int:
        self.cache_config.kv_cache_memory_bytes = 1000
        return 1000

    def asking(requests: int) -> Any:
        cache = SimpleNamespace(kv_cache_memory_bytes=given, cache_dtype="auto")
        scheduler = SimpleNamespace(max_num_seqs=requests)
        return SimpleNamespace(
            vllm_config=SimpleNamespace(scheduler_config=scheduler),
            cache_config=cache,
            model_config=SimpleNamespace(dtype=torch.bfloat16),
        )

    assert worker_wrappers.leave_room(found)(asking(100)) == left
    if given is None:
        with pytest.raises(UnsupportedError, match=r"--max-num-seqs 1000: .* give fewer"):
            worker_wrappers.leave_room(found)(asking(1000))


def test_stages_without_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(num_hidden_layers=4)
    assert divide_layers(model, 3) == ((0, 1), (1, 3), (3, 4))
    assert divide_layers(SimpleNamespace(), 1) is None  # of models made of several, refused later
    with pytest.raises(UsageError, match=r"pipeline_parallel_size=9: 4 layers .* give 4 at most"):
        divide_layers(model, 9)
    for partition in ("1,2", "4,0", "a,b"):
        monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", partition)
        with pytest.raises(UsageError, match="pipeline_parallel_size=2: "):
            divide_layers(model, 2)


def test_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.platforms

    no = dict.fromkeys(("is_cpu", "is_cuda"), lambda: False)
    device = SimpleNamespace(device_name="a toaster", **no)
    monkeypatch.setattr(vllm.platforms, "current_platform", device)
    with pytest.raises(UnsupportedError, match="this is a toaster"):
        checks.check_engine(None)


def test_a_window_that_vllm_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.config

    import reasonalloc.integrations.vllm.backend  # noqa: F401 (imported now, it keeps the real one)

    plan = SimpleNamespace(
        name="a model",
        groups=Groups(1, 1, (16,)),
        shapes=[LayerShape(1, 1, 32), LayerShape(1, 1, 32, sliding_window=16)],
    )
    monkeypatch.setattr(vllm.config, "get_current_vllm_config", lambda: None)
    monkeypatch.setattr(worker_wrappers, "find_budget", lambda config: plan)
    wrap = next(p.wrap for p in PATCHES if p.wrap is worker_wrappers.budget_backend)

    def make(
        self: Any,
        prefix: str = "",
        cache_config: Any = None,
        per_layer_sliding_window: int | None = None,
        attn_backend: Any = None,
        alibi_slopes: list[float] | None = None,
    ) -> None:
        made.append((prefix, attn_backend))

    made: list[tuple[str, Any]] = []
    wrap(make)(None, prefix="layers.1.attn", per_layer_sliding_window=16)
    assert made == [("layers.1.attn", None)]  # vLLM's own backend
    for layer, window in ((1, None), (1, 8), (0, 16)):
        with pytest.raises(UnsupportedError, match=rf"a model cannot run.*layer {layer} has"):
            wrap(make)(None, prefix=f"layers.{layer}.attn", per_layer_sliding_window=window)
    with pytest.raises(UnsupportedError, match="brings its own attention"):
        wrap(make)(None, prefix="layers.0.attn", attn_backend=object())
    with pytest.raises(UnsupportedError, match=r"bias by position \(ALiBi\); run it on"):
        wrap(make)(None, prefix="layers.0.attn", alibi_slopes=[0.5])


def test_the_v2_runner_without_triton(
    engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.triton_utils import HAS_TRITON

    if HAS_TRITON:
        pytest.skip("Triton is there")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(UnsupportedError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        engine({"budget": 64})


def test_speculation_is_refused(engine: Callable[..., Any]) -> None:
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with pytest.raises(UnsupportedError, match="--speculative-config"):
        engine({"budget": 64}, speculative_config=speculative)


def test_a_foreign_cost_profile(engine: Callable[..., Any], tmp_path: Path) -> None:
    made_costs.make(4, 2).save(tmp_path / "costs.json")
    with pytest.raises((UsageError, UnsupportedError)):
        engine({"budget": 64, "arm": "best", "profile": str(tmp_path / "costs.json")})


def test_a_profile_that_was_written_anew_is_read_again(
    engine: Callable[..., Any], folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    path = tmp_path / "costs.json"
    costs = made_costs.of_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    costs = dataclasses.replace(costs, policy="predicted_loss", interval=32, window=8)
    costs.save(path)
    settings = {"budget": 64, "interval": 32, "arm": "best", "profile": str(path)}
    first = engine(settings)
    path.write_text("{")
    assert len(greedy(first, random_prompts([100]), 4)[0]) == 4  # it keeps what it read
    with pytest.raises(UsageError, match=r"costs\.json"):
        engine(settings)


def test_a_prompt_that_never_fits(engine: Callable[..., Any]) -> None:
    from vllm.exceptions import VLLMValidationError

    llm = engine({"budget": 64, "interval": 32}, kv_cache_memory_bytes=1 << 20)
    with pytest.raises(VLLMValidationError, match="shorten it to"):
        greedy(llm, random_prompts([1500]), 4)
    assert len(greedy(llm, random_prompts([100]), 4)[0]) == 4


def test_beams_are_refused(engine: Callable[..., Any]) -> None:
    """Their tokens are requests of their own, and nothing would be evicted."""
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    prompt, beams = {"prompt_token_ids": random_prompts([20])[0]}, BeamSearchParams(1, 4, True)
    plain, made = engine(), engine({"budget": 64})
    tokens = plain.beam_search([prompt], beams)[0].sequences[0].tokens
    assert tokens == [
        *prompt["prompt_token_ids"],
        *greedy(plain, [prompt["prompt_token_ids"]], 4)[0],
    ]
    with pytest.raises(VLLMValidationError, match="beam search cannot be used with a KV budget"):
        made.beam_search([prompt], beams)
    online = SimpleNamespace(engine_client=made.llm_engine)
    with pytest.raises(VLLMValidationError, match="beam search cannot be used with a KV budget"):
        BeamSearchOnlineMixin.beam_search(online, prompt, "name", beams)


def test_input_in_pieces_is_refused(engine: Callable[..., Any]) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    def piece(made: Any) -> Any:
        given = ("name", {"prompt_token_ids": [3, 4, 5]}, SamplingParams(max_tokens=4))
        processor = made.llm_engine.input_processor
        return processor.process_inputs(*given, supported_tasks=("generate",), resumable=True)

    assert piece(engine()).resumable
    with pytest.raises(VLLMValidationError, match=r"streaming input .* with a KV budget"):
        piece(engine({"budget": 64}))


def test_new_weights_where_something_was_copied(engine: Callable[..., Any]) -> None:
    arm = "value_aware(metric=output)/uniform/uniform"
    made = engine({"budget": 64, "arm": arm})
    with pytest.raises(UnsupportedError, match=r"replaced .* output projections"):
        worker(made).update_weights({})
    with pytest.raises(UnsupportedError, match=r"replaced .* output projections"):
        worker(made).reload_weights()
    with pytest.raises(Exception, match="weight"):  # vLLM's own: no transfer was begun
        worker(engine({"budget": 64})).update_weights({})


def test_a_method_that_is_gone_or_changed() -> None:
    where = "vllm.v1.core.kv_cache_manager:KVCacheManager"
    with pytest.raises(UnsupportedError, match="has no"):
        Patch(f"{where}.allocate_everything", (), lambda original: original).apply()
    with pytest.raises(UnsupportedError, match="no parameter 'colour'"):
        Patch(f"{where}.free", ("colour",), lambda original: original).apply()


def test_patches_are_applied_once() -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    before = KVCacheManager.allocate_slots
    for patch in PATCHES:
        patch.apply()
    assert KVCacheManager.allocate_slots is before
