"""Caches that are copied and saved, and models under a budget that are copied and saved."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import reasonalloc
from models import prompt, tiny
from reasonalloc import UsageError

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 25}
STEPS: tuple[Any, ...] = ("eager", "static", "compile")
ARMS = ["rkv", "h2o/uniform/adakv", "lazy_eviction/pyramid/reasonalloc"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("budget", [200, 24])
def test_a_prefilled_prompt_is_shared(step: Any, arm: str, budget: int) -> None:
    model = tiny("llama", num_hidden_layers=4)
    system, turns = prompt(30, 2), [prompt(5, 2, seed=s) for s in (1, 2)]
    with reasonalloc.attach(model, budget=budget, interval=8, arm=arm, step=step) as attached:
        whole = attached.new_cache()
        attached.prefill(system, whole)
        before = [layer.compressor.slab.keys.clone() for layer in whole.layers]
        for turn in turns:
            text = torch.cat([system, turn], dim=1)
            twin = copy.deepcopy(whole)
            assert twin.owner is attached and twin.kv_bytes == whole.kv_bytes
            assert twin.bookkeeping_bytes == whole.bookkeeping_bytes
            out = model.generate(text, past_key_values=twin, **GREEDY)
            alone = attached.new_cache()
            attached.prefill(system, alone)
            assert torch.equal(out, model.generate(text, past_key_values=alone, **GREEDY))
            assert twin.kv_bytes == attached.plan(2).kv_bytes(twin.get_seq_length())
        assert whole.get_seq_length() == 30
        after = [layer.compressor.slab.keys for layer in whole.layers]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        shallow = copy.copy(whole)
        assert shallow.layers[0].compressor.slab.keys.data_ptr() != after[0].data_ptr()


@pytest.mark.parametrize("name", ["gemma2", "qwen3"])
@pytest.mark.parametrize("budget", [200, 20])
def test_saved_and_loaded(name: str, budget: int, tmp_path: Path) -> None:
    model, path = tiny(name), tmp_path / "prompt.safetensors"
    ids = prompt(35, 2)
    mask = torch.ones_like(ids)
    mask[1, :8] = 0
    text = torch.cat([ids, prompt(5, 2, seed=1)], dim=1)
    mask_of_text = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], dim=1)
    for arm in ARMS:
        settings: dict[str, Any] = {"budget": budget, "interval": 8, "arm": arm}
        with reasonalloc.attach(model, **settings) as attached:
            cache = attached.new_cache()
            model(ids, attention_mask=mask, past_key_values=cache)
            for _ in range(3):
                mask_now = torch.cat(
                    [mask, torch.ones(2, cache.get_seq_length() - 34, dtype=torch.long)], dim=1
                )
                model(prompt(1, 2), attention_mask=mask_now, past_key_values=cache)
            attached.save_cache(cache, path)
            whole = torch.cat([ids, prompt(1, 2).expand(-1, 3), text[:, 35:]], dim=1)
            wide = torch.cat([mask_of_text, torch.ones(2, 3, dtype=torch.long)], dim=1)
            expected = model.generate(
                whole, attention_mask=wide, past_key_values=copy.deepcopy(cache), **GREEDY
            )
        with reasonalloc.attach(model, **settings) as attached:
            loaded = attached.load_cache(path)
            assert loaded.kv_bytes == cache.kv_bytes
            assert loaded.retained_tokens == cache.retained_tokens
            assert loaded.recorder.compressions == cache.recorder.compressions
            found = model.generate(whole, attention_mask=wide, past_key_values=loaded, **GREEDY)
            assert torch.equal(found, expected)
        with (
            reasonalloc.attach(model, **{**settings, "interval": 9}) as attached,
            pytest.raises(UsageError, match="made with interval=8, this attachment has interval=9"),
        ):
            attached.load_cache(path)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("arm", ARMS)
def test_sequences_are_repeated_and_taken_out(name: str, arm: str) -> None:
    model = tiny(name)
    ids, mask = prompt(30, 3), torch.ones(3, 30, dtype=torch.long)
    mask[1, :7] = 0
    turn = prompt(4, 3, seed=2)
    text, shown = torch.cat([ids, turn], dim=1), torch.cat([mask, torch.ones_like(turn)], dim=1)
    with reasonalloc.attach(model, budget=20, interval=8, arm=arm) as attached:
        cache = attached.new_cache()
        model(ids, attention_mask=mask, past_key_values=cache)
        whole = copy.deepcopy(cache)
        expected = model.generate(text, attention_mask=shown, past_key_values=cache, **GREEDY)
        for rows in ([2, 1], [1], [0, 0, 2, 2, 1]):
            twin = copy.deepcopy(whole)
            twin.batch_select_indices(torch.tensor(rows))
            out = model.generate(
                text[rows], attention_mask=shown[rows], past_key_values=twin, **GREEDY
            )
            assert torch.equal(out, expected[rows])
            assert twin.kv_bytes == attached.plan(len(rows)).kv_bytes(twin.get_seq_length())
        whole.batch_repeat_interleave(2)
        out = model.generate(
            text,
            attention_mask=shown,
            past_key_values=whole,
            num_return_sequences=2,
            **{**GREEDY, "do_sample": True, "top_k": 1},
        )
        assert torch.equal(out, expected.repeat_interleave(2, dim=0))
        whole.reset()
        assert whole.get_seq_length() == 0 and whole.kv_bytes > 0
        again = model.generate(
            ids.repeat(2, 1), attention_mask=mask.repeat(2, 1), past_key_values=whole, **GREEDY
        )
        assert torch.equal(again[:3], model.generate(ids, attention_mask=mask, **GREEDY))
        with pytest.raises(UsageError, match="has seen nothing yet"):
            attached.new_cache().batch_repeat_interleave(2)


def broken(path: Path, change: Any) -> None:
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, str(path), metadata)


CHANGES: list[Any] = [
    lambda t, m: t.pop("0.keys"),
    lambda t, m: t.update({"0.keys": t["0.keys"][:, :-1].contiguous()}),
    lambda t, m: t.update({"0.keys": t["0.keys"].double()}),
    lambda t, m: t.update({"1.offsets": t["1.offsets"] + 10**9}),
    lambda t, m: t.update({"1.lengths": t["1.lengths"] + 10**6}),
    lambda t, m: t.update({"1.lengths": -t["1.lengths"]}),
    lambda t, m: t.update({"1.positions": t["1.positions"] + 1000}),
    lambda t, m: t.update({"1.queries": t["1.queries"][:, :2].contiguous()}),
    lambda t, m: t.update({"ids": t["ids"][:, :3].contiguous()}),
    lambda t, m: m.update({"numbers": "{}"}),
    lambda t, m: m.update({"numbers": m["numbers"].replace('"since": 0', '"since": 99')}),
    lambda t, m: m.update({"format": "other"}),
    lambda t, m: m.update({"fingerprint": "["}),
]


@pytest.mark.parametrize("change", CHANGES)
def test_broken_files_are_refused_in_one_line(change: Any, tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "cache.safetensors"
    with reasonalloc.attach(model, budget=24, interval=8) as attached:
        cache = attached.new_cache()
        with pytest.raises(UsageError, match="has seen nothing yet"):
            attached.save_cache(cache, path)
        attached.prefill(prompt(30), cache)
        attached.save_cache(cache, path)
        broken(path, change)
        with pytest.raises(UsageError) as caught:
            attached.load_cache(path)
        assert "\n" not in str(caught.value)
        path.write_bytes(b"nothing")
        with pytest.raises(UsageError, match="cannot be read"):
            attached.load_cache(path)
        with pytest.raises(UsageError, match="cannot be read"):
            attached.load_cache(tmp_path / "missing")
        with pytest.raises(UsageError, match="cannot be written"):
            attached.save_cache(cache, tmp_path / "no" / "folder")
    with (
        reasonalloc.attach(model, budget=24, interval=8) as other,
        pytest.raises(UsageError, match="was detached"),
    ):
        other.save_cache(cache, path)


def test_a_number_that_changed_on_the_disk_is_found(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "cache.safetensors"
    with reasonalloc.attach(model, budget=24, interval=8) as attached:
        cache = attached.new_cache()
        attached.prefill(prompt(30), cache)
        attached.save_cache(cache, path)
        before = path.read_bytes()
        for place in (-1, -1000, -3000):  # in the tensors, which lie behind a header
            content = bytearray(before)
            content[place] ^= 1
            path.write_bytes(content)
            with pytest.raises(UsageError, match="broken"):
                attached.load_cache(path)
        path.write_bytes(before)
        broken(path, lambda t, m: t["0.keys"].view(torch.int32)[0, 0, 0].bitwise_xor_(1))
        with pytest.raises(UsageError, match=r"broken: its checksum is [0-9a-f]{8}, not"):
            attached.load_cache(path)
        path.write_bytes(before)
        assert attached.load_cache(path).retained_tokens == cache.retained_tokens
        broken(path, lambda t, m: m.pop("crc32"))  # as older versions wrote them
        assert attached.load_cache(path).retained_tokens == cache.retained_tokens


def test_pickling_says_what_to_do() -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, budget=24, interval=8) as attached:
        out = model.generate(prompt(30), return_dict_in_generate=True, **GREEDY)
        for thing in (out.past_key_values, out):
            with pytest.raises(UsageError, match=r"save it with save_cache\(cache, path\)"):
                torch.save(thing, io.BytesIO())
        with pytest.raises(UsageError, match="attachment cannot be pickled"):
            pickle.dumps(attached)
        with pytest.raises(UsageError, match="attachment cannot be copied"):
            copy.deepcopy(attached)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("step", ["eager", "static"])
def test_an_attached_model_saves_like_a_plain_one(name: str, step: Any, tmp_path: Path) -> None:
    if name == "gemma3" and step == "static":
        pytest.skip("sliding windows have no static steps")
    model = tiny(name)
    expected = model.generate(prompt(30), **GREEDY)
    before = model.config._attn_implementation
    with reasonalloc.attach(model, budget=24, interval=8, step=step) as attached:
        under = model.generate(prompt(30), **GREEDY)
        file = io.BytesIO()
        torch.save(model, file)
        twin = copy.deepcopy(model)
        model.save_pretrained(tmp_path)
        file.seek(0)
        for other in (
            torch.load(file, weights_only=False),
            twin,
            type(model).from_pretrained(tmp_path),
        ):
            assert "reasonalloc" not in str(other.config._attn_implementation)
            assert "reasonalloc" not in str(vars(other))
            assert not other._forward_pre_hooks and not other.model._forward_pre_hooks
            assert torch.equal(other.generate(prompt(30), **GREEDY), expected)
        assert twin.config._attn_implementation == before
        assert twin.lm_head.weight.data_ptr() != model.lm_head.weight.data_ptr()
        assert torch.equal(model.generate(prompt(30), **GREEDY), under)  # still under the budget
        assert attached.recorder is not None and attached.recorder.compressions
    with reasonalloc.attach(twin, budget=24, interval=8):
        assert torch.equal(twin.generate(prompt(30), **GREEDY), under)
