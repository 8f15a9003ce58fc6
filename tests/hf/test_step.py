"""Static decode steps: the same tokens as plain steps, also when they are replayed like a graph."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler
from torch._subclasses.fake_tensor import FakeTensorMode

import reasonalloc
import recorded_graph
from generations import check_a_small_budget
from made_statistics import ready
from models import FACTORIES, prompt, tiny
from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.attention import choose_backend
from reasonalloc.config import CompressionConfig
from reasonalloc.core.compressor import LayerCompressor
from reasonalloc.core.recorder import Recorder
from reasonalloc.cpu_step import build, compiled
from reasonalloc.errors import UnsupportedError, UsageError
from reasonalloc.integrations.hf import BudgetCache
from reasonalloc.integrations.hf import step as steps
from reasonalloc.policies import POLICIES
from reference import NAMED_BY_A_FILE

ARMS = ["rkv", "h2o/pyramid/adakv", "snapkv/uniform/reasonalloc", "value_aware/uniform/uniform"]
LAZY = "lazy_eviction/uniform/reasonalloc"
STEPS: tuple[Any, ...] = ("eager", "static", "graph")
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 45}
SLIDING = ("gemma2", "gemma3", "gpt_oss")
PLAIN = sorted(set(FACTORIES) - {*SLIDING, "gpt_oss_full"})


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """step='graph' on a CPU, with operations that are noted and repeated."""
    check = steps.check_step
    monkeypatch.setattr(steps, "capture", recorded_graph.capture)
    monkeypatch.setattr(
        sys.modules["reasonalloc.integrations.hf.attachment"],  # the name alone is the function
        "check_step",
        lambda step, *rest: check("static" if step == "graph" else step, *rest),
    )


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(30) >= 30 - torch.tensor([30, 17, 2])[:, None]
    return prompt(30, 3) * mask, mask.long()


@pytest.mark.parametrize("name", sorted(set(FACTORIES) - set(SLIDING)))
def test_the_same_tokens(name: str, recorded: None) -> None:
    model = tiny(name)
    ids, mask = padded()
    for arm in ARMS:
        outs = []
        for step in STEPS:
            with reasonalloc.attach(model, budget=16, interval=8, arm=arm, step=step) as attached:
                found = [
                    model.generate(ids, attention_mask=mask, **GREEDY),
                    model.generate(prompt(25, 2), **GREEDY),
                    model.generate(prompt(1), **GREEDY),
                ]
                assert attached.recorder is not None and attached.recorder.compressions > 0
                outs.append(found)
            assert "forward" not in model.__dict__
        for found in outs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found, outs[0], strict=True)), arm


def test_sampling_streaming_and_further_turns(recorded: None) -> None:
    model = tiny("qwen3")
    sampled = {"do_sample": True, "temperature": 0.8, "num_return_sequences": 3}
    outs = []
    for step in STEPS:
        pieces: list[int] = []
        streamer = Pieces(pieces)
        with reasonalloc.attach(model, budget=16, interval=8, heads="adakv", step=step) as attached:
            torch.manual_seed(3)
            out = model.generate(
                prompt(20),
                max_new_tokens=20,
                repetition_penalty=1.2,
                return_dict_in_generate=True,
                output_logits=True,
                **sampled,
            )
            more = torch.cat([out.sequences, prompt(5, 3)], dim=1)
            second = model.generate(
                more, past_key_values=out.past_key_values, max_new_tokens=20, do_sample=False
            )
            alone = model.generate(prompt(9), max_new_tokens=20, do_sample=False, streamer=streamer)
            assert pieces == alone[0].tolist()
            assert out.past_key_values.get_seq_length() == 20 + 20 + 5 + 19
            assert out.past_key_values.bookkeeping_bytes == attached.plan(3).bookkeeping_bytes
        outs.append((torch.stack(out.logits), out.sequences, second, alone))
    for found in outs[1:]:
        torch.testing.assert_close(found[0], outs[0][0])
        assert all(torch.equal(a, b) for a, b in zip(found[1:], outs[0][1:], strict=True))


class Pieces:
    def __init__(self, found: list[int]) -> None:
        self.found = found

    def put(self, value: torch.Tensor) -> None:
        self.found.extend(value.flatten().tolist())

    def end(self) -> None:
        pass


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize(
    ("name", "arm"),
    list(zip([*PLAIN, "gpt_oss_full"], 2 * [*ARMS, LAZY], strict=False)),
)
def test_compiled_steps_write_the_same(name: str, arm: str, attention: str) -> None:
    model = tiny(name)
    ids, mask = padded()
    sampled = {"do_sample": True, "temperature": 0.8, "max_new_tokens": 20}
    again = {"return_dict_in_generate": True, "output_logits": True}
    outs = []
    for step in ("eager", "compile"):
        with reasonalloc.attach(
            model, budget=16, interval=8, arm=arm, step=step, attention=attention
        ) as attached:
            torch.manual_seed(3)
            first = model.generate(ids, attention_mask=mask, **GREEDY, **again)
            more = torch.cat([first.sequences, prompt(5, 3)], dim=1)
            mask_of_more = torch.cat([mask, torch.ones(3, 50, dtype=torch.long)], dim=1)
            second = model.generate(
                more,
                attention_mask=mask_of_more,
                past_key_values=first.past_key_values,
                **sampled,
                **again,
            )
            equal = model.generate(prompt(25, 6), **GREEDY, **again)  # products of panels
            assert attached.recorder is not None and attached.recorder.compressions > 0
        outs.append([first, second, equal])
    for plain, other in zip(*outs, strict=True):
        assert torch.equal(plain.sequences, other.sequences)
        logits = (torch.stack(x.logits) for x in (plain, other))
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_nothing_of_a_step_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """But mixtures of experts, and what policies that watch attention do with it."""
    left: dict[str, set[str]] = {}
    repetition = compiled._repetition

    def noting(call: Any) -> Any:
        left[name].add(str(call.func))
        return repetition(call)

    monkeypatch.setattr(compiled, "_repetition", noting)
    for name in sorted(set(FACTORIES) - {*SLIDING, "gpt_oss_full", "mixtral", "qwen3_moe"}):
        left[name] = set()
        model = tiny(name)
        with reasonalloc.attach(model, budget=16, interval=8, step="compile"):
            model.generate(prompt(20), max_new_tokens=5, do_sample=False)
    assert left == {name: set() for name in left}


@pytest.mark.filterwarnings("ignore")  # PyTorch's own: this way of quantising is on its way out
def test_weights_packed_in_objects_are_refused_by_name() -> None:
    """No two views of such an object are known to be equal."""
    quantise = torch.ao.quantization.quantize_dynamic
    model = quantise(tiny("llama"), {torch.nn.Linear}, dtype=torch.qint8)
    with (
        reasonalloc.attach(model, budget=16, interval=8, step="compile"),
        pytest.raises(UnsupportedError, match=r"\(quantized\.linear_dynamic.*step='eager'"),
    ):
        model.generate(prompt(20), **GREEDY)


def test_what_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")

    def reading(states: torch.Tensor) -> torch.Tensor:
        return states * (2.0 if float(states.sum()) > 1e9 else 1.0)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("C++ compile error\n\nx.cpp:1: fatal error: omp.h: No such file\n...")

    with (
        reasonalloc.attach(model, budget=16, interval=8, step="compile"),
        monkeypatch.context() as patch,
        pytest.raises(UnsupportedError, match="reads numbers back"),
    ):
        patch.setitem(model.model.norm.__dict__, "forward", reading)
        model.generate(prompt(20), **GREEDY)
    by_torch = tiny("llama")
    by_torch.compile(backend="eager")
    with pytest.raises(UnsupportedError, match=r"step='compile' .*model\.compile\(\) was called"):
        reasonalloc.attach(by_torch, budget=16, step="compile")
    with pytest.raises(UnsupportedError, match=r"step='compile' computes in .* torch\.float64"):
        reasonalloc.attach(tiny("llama").double(), budget=16, step="compile")
    with monkeypatch.context() as patch:
        patch.setattr(build, "library", broken)
        with pytest.raises(UnsupportedError, match=r"step='compile'.*\(x\.cpp.*omp\.h.*eager"):
            reasonalloc.attach(model, budget=16, step="compile")

    def none(*args: Any) -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(torch._inductor.cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler.*step='eager'"):
        reasonalloc.attach(model, budget=16, step="compile")


def test_extra_outputs_are_steps_of_their_own(recorded: None) -> None:
    model = tiny("llama")
    settings = {"return_dict_in_generate": True, "output_hidden_states": True, **GREEDY}
    found = []
    for step in STEPS:
        with reasonalloc.attach(model, budget=16, interval=8, step=step):
            out = model.generate(prompt(20), **settings)
        found.append(torch.stack([states[-1][:, -1] for states in out.hidden_states]))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_a_plain_loop(recorded: None) -> None:
    """Without position ids and masks, as the benchmark decodes."""
    model = tiny("llama")
    written = []
    for step in STEPS:
        with reasonalloc.attach(model, budget=16, interval=8, step=step) as attached:
            cache, tokens = attached.new_cache(), [prompt(20, 2)]
            with attached.decoding(cache), torch.inference_mode():
                for _ in range(30):
                    out = model(input_ids=tokens[-1], past_key_values=cache)
                    tokens.append(out.logits[:, -1:].argmax(dim=-1))
        written.append(torch.cat(tokens, dim=1))
    assert torch.equal(written[1], written[0]) and torch.equal(written[2], written[0])


@pytest.mark.parametrize("step", ["static", "graph", "compile"])
def test_a_step_that_breaks_off_spoils_the_cache(
    step: Any, recorded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, budget=16, interval=8, step=step) as attached:
        cache = attached.new_cache()
        norm, calls = model.model.norm, []

        def broken(*args: Any) -> None:
            calls.append(args)
            if len(calls) == 3:
                raise RuntimeError("no memory")
            return type(norm).forward(norm, *args)

        monkeypatch.setitem(norm.__dict__, "forward", broken)
        with pytest.raises((RuntimeError, UnsupportedError), match="no memory"):
            model.generate(prompt(20), past_key_values=cache, **GREEDY)
        with pytest.raises(UsageError, match="interrupted or failed"):
            model(prompt(1), past_key_values=cache)


def test_a_program_that_breaks_off_spoils_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, budget=16, interval=8, step="compile") as attached:
        cache, token = attached.new_cache(), prompt(1)
        with attached.decoding(cache), torch.inference_mode():
            model(input_ids=prompt(20), past_key_values=cache)
            for _ in range(3):
                model(input_ids=token, past_key_values=cache)

            def interrupted(*args: Any) -> int:
                raise KeyboardInterrupt

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(build.library(), "reasonalloc_run", interrupted)
                model(input_ids=token, past_key_values=cache)
            with pytest.raises(UsageError, match="interrupted or failed"):
                model(prompt(1), past_key_values=cache)


def test_a_step_that_reads_cannot_be_captured(
    recorded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    norm = model.model.norm

    def reading(states: torch.Tensor) -> torch.Tensor:
        return states * (2.0 if float(states.sum()) > 1e9 else 1.0)

    monkeypatch.setitem(norm.__dict__, "forward", reading)
    with (
        reasonalloc.attach(model, budget=16, interval=8, step="graph"),
        pytest.raises(UnsupportedError, match="cannot be captured in a CUDA graph"),
    ):
        model.generate(prompt(20), **GREEDY)


def test_replays_notice_numbers_of_the_host(
    recorded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What this file relies on: with lengths and positions on the host a replay goes wrong."""
    model = tiny("llama")
    with reasonalloc.attach(model, budget=16, interval=8):
        expected = model.generate(prompt(20), **GREEDY)
    monkeypatch.setattr(BudgetCache, "fix", lambda cache: None)
    with reasonalloc.attach(model, budget=16, interval=8, step="graph"):
        assert not torch.equal(model.generate(prompt(20), **GREEDY), expected)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="did you mean 'static'"):
        reasonalloc.attach(tiny("llama"), budget=16, step="statik")  # type: ignore[arg-type]
    for name in SLIDING:
        with pytest.raises(UnsupportedError, match="sliding window grow"):
            reasonalloc.attach(tiny(name), budget=16, step="compile")
        check_a_small_budget(tiny(name), 40)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="needs a GPU, but the model is on cpu"):
            reasonalloc.attach(tiny("llama"), budget=16, step="graph")


@pytest.mark.parametrize("policy", sorted(set(POLICIES.entries()) - NAMED_BY_A_FILE))
def test_a_static_step_reads_nothing_and_moves_nothing(policy: str) -> None:
    layer = LayerCompressor(
        0,
        3 * 24,
        CompressionConfig(budget=24, interval=8),
        ready(policy, 0, 6, 16),
        HEAD_ALLOCATORS.create("uniform"),
        choose_backend("auto"),
        Recorder(),
    )

    def forward(columns: int) -> None:
        query = torch.ones(2, 6, columns, 16)
        key = torch.ones(2, 3, columns, 16)
        layer.forward(query, key, key, None, 0.25)

    with FakeTensorMode():
        forward(20)
        layer.fix()
        layer.static = True
        forward(1)
    layer.static = False
    assert layer.unsettled


def test_a_compression_moves_nothing() -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, budget=16, interval=8, arm="h2o", step="static") as attached:
        cache = attached.new_cache()
        places = []
        with attached.decoding(cache):
            model(input_ids=prompt(20, 2), past_key_values=cache)
            for _ in range(20):
                model(input_ids=prompt(1, 2), past_key_values=cache)
                places.append([tensor.data_ptr() for tensor in tensors_of(cache)])
        assert attached.recorder is not None and attached.recorder.compressions > 6
    assert all(place == places[0] for place in places)


def tensors_of(cache: Any) -> list[torch.Tensor]:
    found = []
    for layer in cache.layers:
        inside = layer.compressor
        parts = [inside, inside.slab, *([inside._queries] if inside._queries else [])]
        for part in parts:
            found += [v for v in vars(part).values() if isinstance(v, torch.Tensor)]
    return found
