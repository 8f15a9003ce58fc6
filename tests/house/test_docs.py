"""What documentation says about the code is true of the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import reasonalloc
from made_candidates import ragged
from models import prompt, tiny
from reasonalloc import api
from reasonalloc.allocators.head import HEAD_ALLOCATORS
from reasonalloc.allocators.layer import LAYER_ALLOCATORS, LayerQuery
from reasonalloc.config import PRESETS
from reasonalloc.policies import POLICIES
from reference import Head

_ROOT = Path(__file__).parents[2]
_POLICIES = (_ROOT / "docs/policies.md").read_text("utf-8")
_CONTRIBUTING = (_ROOT / "CONTRIBUTING.md").read_text("utf-8")


def test_the_page_of_policies_names_everything() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", _POLICIES, re.MULTILINE)
    parts = [*POLICIES.entries(), *LAYER_ALLOCATORS.entries(), *HEAD_ALLOCATORS.entries()]
    assert sorted(rows) == sorted([*parts, *PRESETS])
    for name, preset in PRESETS.items():
        arm = "no compression" if preset.arm is None else f"`{preset.arm}`"
        assert f"| `{name}` | {arm} |" in _POLICIES


def test_every_public_name_is_in_the_api_reference() -> None:
    page = (_ROOT / "docs/api.md").read_text("utf-8")
    named = {line.rsplit(".", 1)[-1] for line in page.splitlines() if line.startswith("::: ")}
    assert set(reasonalloc.__all__) - {"__version__"} <= named


def test_every_page_is_in_the_navigation() -> None:
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((_ROOT / "mkdocs.yml").read_text("utf-8"))
    pages = {page for entry in config["nav"] for page in entry.values()}
    assert pages == {path.name for path in (_ROOT / "docs").glob("*.md")}
    assert config["theme"]["font"] is False, "the site must work offline"


def recipes() -> dict[str, str]:
    """Code of CONTRIBUTING.md by the file that it is for."""
    blocks = re.findall(r"```python\n# ([\w/.]+)[^\n]*\n(.*?)```", _CONTRIBUTING, re.DOTALL)
    return dict(blocks)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the recipes define; registered until the test ends."""
    for registry in (POLICIES, HEAD_ALLOCATORS, LAYER_ALLOCATORS):
        monkeypatch.setattr(registry, "_entries", registry.entries())
    module = ModuleType("recipes")
    monkeypatch.setitem(sys.modules, "recipes", module)
    names = vars(module)
    names["Head"] = Head
    for path, code in recipes().items():
        if (path.startswith("src/reasonalloc/") and path.count("/") > 2) or "reference" in path:
            exec(compile(code, path, "exec", dont_inherit=True), names)
    return names


def test_recipes_work(made: dict[str, Any]) -> None:
    arm = "value_norm(p=1)/ends/mass"
    model = tiny("llama")
    with reasonalloc.attach(model, budget=24, arm=arm, interval=8, window=4) as attached:
        model.generate(prompt(40), max_new_tokens=20, do_sample=False)
        assert attached.recorder is not None and attached.recorder.compressions > 0
    query = LayerQuery(layers=3, kv_heads=2, budget=20, window=4)
    assert LAYER_ALLOCATORS.create("ends").allocate(query) == [48, 24, 48]


def test_the_recipe_of_a_reference_equals_its_policy(made: dict[str, Any]) -> None:
    candidates = ragged(0, [[9, 12], [10, 11]], 2, 3)
    for p in (1.0, 2.0):
        scores = POLICIES.create(f"value_norm(p={p})").score(candidates)
        for b, h in ((0, 0), (1, 1)):
            n = int(candidates.lengths[b, h])
            head = SimpleNamespace(values=candidates.values[b, h, :n])
            slow = made["score_value_norm"](head, p)
            torch.testing.assert_close(scores[b, h, :n], torch.tensor(slow))


def test_every_public_name_has_a_docstring() -> None:
    for name in reasonalloc.__all__:
        value = getattr(reasonalloc, name)
        if isinstance(value, type) or callable(value):
            assert len(value.__doc__ or "") > 20, name


def test_the_api_and_the_package_offer_the_same() -> None:
    errors = {name for name in vars(reasonalloc.errors) if name[0].isupper()}
    own = set(reasonalloc.__all__) - errors - {"__version__"}
    assert own == set(api.__all__)
