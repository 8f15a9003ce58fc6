"""Models whose weights or forward calls are not transformers' plain ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import reasonalloc
from models import prompt, tiny
from reasonalloc.errors import UnsupportedError

SMALL: dict[str, Any] = {"budget": 16, "interval": 8, "window": 4}


def check(model: Any, **settings: Any) -> None:
    """A budget that holds everything changes nothing, and a small one compresses."""
    ids = prompt(30, 2, seed=1)
    how: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    full = model.generate(ids, **how)
    with reasonalloc.attach(model, budget=80, **settings):
        assert torch.equal(model.generate(ids, **how), full)
    with reasonalloc.attach(model, **SMALL, **settings) as attached:
        model.generate(ids, **how)
        assert attached.recorder is not None and attached.recorder.compressions > 3
    assert torch.equal(model.generate(ids, **how), full)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.once
@pytest.mark.parametrize("step", ["eager", "compile"])
def test_int8_weights_of_torchao(folder: Path, step: str) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    check(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config), step=step)


@pytest.mark.once
@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_bitsandbytes(tmp_path: Path, bits: int) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny("llama", hidden_size=192, intermediate_size=256).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)
    settings: dict[str, Any] = {"quantization_config": config, "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **settings)
    check(model)
    check(model, step="static")
    if bits == 8:
        ids = prompt(30)
        with (
            reasonalloc.attach(model, **SMALL, step="compile"),
            pytest.raises(UnsupportedError, match=r"step='compile': .*bitsandbytes"),
        ):
            model.generate(ids, max_new_tokens=9, do_sample=False)


@pytest.mark.once
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_device_map(folder: Path, tmp_path: Path, place: str) -> None:
    pytest.importorskip("accelerate")
    names = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head", "model.layers.0")
    where = {**dict.fromkeys(names, "cpu"), "model.layers.1": place, "model.layers.2": "cpu"}
    check(
        AutoModelForCausalLM.from_pretrained(
            folder, device_map=where, offload_folder=tmp_path / "weights"
        )
    )


@pytest.mark.once
def test_a_compiled_forward() -> None:
    model = tiny("llama")
    model.forward = torch.compile(model.forward, backend="eager")
    check(model)
