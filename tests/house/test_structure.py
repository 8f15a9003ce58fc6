"""``docs/structure.md`` against the tree, and the path of a key against a run."""

from __future__ import annotations

import re
import sys
from itertools import product
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import reasonalloc
from models import prompt, tiny

ROOT = Path(reasonalloc.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "structure.md"
DATA = (".json", ".safetensors", ".pyc")


def expanded(name: str) -> list[str]:
    """``a/{b,c}.py`` as ``a/b.py`` and ``a/c.py``."""
    parts = re.split(r"\{([^}]*)\}", name)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(choice) for choice in product(*choices)]


def test_every_module_has_its_line() -> None:
    named: list[str] = []
    for row in re.findall(r"^\| (`[^|]*)\|", PAGE.read_text("utf-8"), re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", row):
            named += expanded(name)
    files = {
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*")
        if path.is_file() and path.name != "__init__.py" and path.suffix not in DATA
    }
    files = {name for name in files if not name.startswith("boxed/checkpoint/")}
    assert sorted(named) == sorted(set(named)), "named twice"
    assert set(named) - files == set(), "is not there"
    assert files - set(named) == set(), "has no line"


def stops() -> list[tuple[str, str]]:
    """File and function of every stop of the path."""
    text = PAGE.read_text("utf-8").partition("## The path of a key")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. `([\w/.]+):([\w.]+)`", text, re.MULTILINE)


def test_the_path_of_a_key() -> None:
    """A key goes through the stops in their order, and from one into the next."""
    path = stops()
    assert 1 < len(path) <= 6
    model, arrived = tiny("llama", num_hidden_layers=2), []
    numbers = {stop: number for number, stop in enumerate(path)}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(str(ROOT)):
            return
        name = Path(frame.f_code.co_filename).relative_to(ROOT).as_posix()
        owner = frame.f_locals.get("self")
        qualified = [frame.f_code.co_name]
        if owner is not None:
            qualified += [f"{c.__name__}.{frame.f_code.co_name}" for c in type(owner).__mro__]
        for function in qualified:
            if (name, function) in numbers:
                arrived.append(numbers[name, function])

    with reasonalloc.attach(model, budget=16, interval=8) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(prompt(20), past_key_values=cache)
        for _ in range(7):
            model(prompt(1), past_key_values=cache)
        slab = cache.layers[0].compressor.slab
        before = cache.recorder.compressions
        sys.setprofile(note)
        model(prompt(1), past_key_values=cache)  # the eighth step ends with a boundary
        sys.setprofile(None)
        assert cache.recorder.compressions == before + 2
        assert slab is not None and int(slab.positions.max()) == 27  # the key is there
    layers = [arrived[: len(arrived) // 2], arrived[len(arrived) // 2 :]]
    for layer in layers:
        first = [layer.index(number) for number in range(len(path))]
        assert first == sorted(first), (path, layer)
