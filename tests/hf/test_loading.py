from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reasonalloc import loading
from reasonalloc.calibrated.demand import config_hash
from reasonalloc.errors import UsageError
from reasonalloc.integrations.hf.smollm2 import FILE, cache_folder
from tiny_folder import save_tiny, write_gguf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


def test_folder(folder: Path) -> None:
    config = loading.load_config(str(folder))
    model, tokenizer = loading.load_model(str(folder), device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    assert config_hash(config.to_dict()) == config_hash(model.config.to_dict())
    assert tokenizer("w1 w2").input_ids == [6, 7]


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype(folder: Path, name: str) -> None:
    model, _ = loading.load_model(str(folder), name, "cpu")
    assert model.dtype == getattr(torch, name)
    assert loading.resolve_dtype(name, model.config) == model.dtype


def test_auto_dtype_is_the_checkpoints(tmp_path: Path) -> None:
    path = str(save_tiny(tmp_path, torch.bfloat16))
    assert loading.resolve_dtype("auto", loading.load_config(path)) == torch.bfloat16
    assert loading.load_model(path, "auto", "cpu")[0].dtype == torch.bfloat16


def broken_weights(path: Path) -> Path:
    save_tiny(path)
    (path / "model.safetensors").write_bytes(b"rubbish")
    return path


def broken_config(path: Path) -> Path:
    save_tiny(path)
    (path / "config.json").write_text("{")
    return path


def unknown_kind(path: Path) -> Path:
    save_tiny(path)
    data = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**data, "model_type": "nonsense"}))
    return path


def no_tokenizer(path: Path) -> Path:
    save_tiny(path)
    for file in path.glob("*token*"):
        file.unlink()
    return path


@pytest.mark.parametrize("breakage", [broken_weights, broken_config, unknown_kind, no_tokenizer])
def test_broken_folder_is_one_sentence(tmp_path: Path, breakage: Callable[[Path], Path]) -> None:
    with pytest.raises(UsageError, match=r"cannot be loaded|needs a package") as caught:
        loading.load_model(str(breakage(tmp_path)), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("", "is empty"),
        ("./nowhere", "no such folder or file"),
        ("nowhere.gguf", "no such folder or file"),
        ("a b", "no such folder or file"),
        ("a/b/c", "no such folder or file"),
    ],
)
def test_missing(name: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        loading.load_config(name)


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "hub_reachable", lambda: False)
    with pytest.raises(UsageError, match="hub cannot be reached"):
        loading.load_config("nobody/nothing-at-all")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"without config\.json"):
        loading.load_config(str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"x\.gguf"):
        loading.load_config(str(tmp_path))


def test_no_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    file = tmp_path / "x.gguf"
    file.write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match="not a GGUF file"):
        loading.load_config(str(file))
    file.write_bytes(b"GGUF\x03\x00\x00\x00 and then rubbish")
    with pytest.raises(UsageError, match="cannot be loaded"):
        loading.load_config(str(file))


def test_device() -> None:
    with pytest.raises(UsageError, match="not available here"):
        loading.resolve_device("cuda:77")
    assert loading.resolve_device("cpu").type == "cpu"


def test_unknown_dtype(folder: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'float32'"):
        loading.load_model(str(folder), "float23", "cpu")


def test_gguf_special_tokens(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    config = loading.load_config(str(file))
    model, tokenizer = loading.load_model(str(file), "auto", "cpu", config=config)
    last = model.config.vocab_size - 1
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<start>", "<stop>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<pad>", "<unk>")
    for holder in (model.config, model.generation_config):
        ids = (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id)
        assert ids == (last - 1, last, 1)
    assert "<start>" in tokenizer.chat_template
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert config_hash(loading.load_config(str(file)).to_dict()) == config_hash(
        model.config.to_dict()
    )


def test_the_demos_model() -> None:
    file = cache_folder() / FILE
    if not file.is_file():
        pytest.skip("the demo's model is not in the cache")
    model, tokenizer = loading.load_model(str(file), "float32", "cpu")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert model.generation_config.eos_token_id == 2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
