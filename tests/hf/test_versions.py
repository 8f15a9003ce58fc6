"""Releases of transformers: the name of the cache, and a word about untested ones."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import reasonalloc
from models import prompt, tiny
from reasonalloc.benchmark.decode import one_step
from reasonalloc.diagnose.selftest import self_test
from reasonalloc.errors import UntestedVersion, UsageError
from reasonalloc.integrations.hf import BudgetCache, step, versions
from reasonalloc.integrations.hf.replay import replay_logits
from reasonalloc.texts import Trajectory

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
NAMES = ("past_key_values", "cache")


@pytest.fixture
def no_deprecations() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
        yield


@pytest.fixture
def anew() -> Iterator[None]:
    """As in a process that has not attached anything."""
    versions.warn_if_untested.cache_clear()
    yield
    versions.warn_if_untested.cache_clear()


@pytest.mark.parametrize("kind", ["eager", "static", "compile"])
def test_both_names_on_every_release(kind: Any, no_deprecations: None) -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, budget=16, interval=8, step=kind) as attached:
        expected = model.generate(prompt(20), **GREEDY)
        assert attached.recorder is not None and attached.recorder.compressions > 0
        for name in NAMES:
            cache = attached.new_cache()
            assert torch.equal(model.generate(prompt(20), **{name: cache}, **GREEDY), expected)
            assert attached.cache is cache and cache.get_seq_length() == 39
            assert cache.recorder.compressions > 0
            logits = model(prompt(20), **{name: attached.new_cache()}).logits
            assert torch.equal(logits[:, -1].argmax(-1), expected[:, 20])
        position = list(inspect.signature(model.forward).parameters).index(versions.cache_name())
        cache = attached.new_cache()
        model(prompt(20), *[None] * (position - 1), cache)
        assert cache.get_seq_length() == 20


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_heard_under_both_names(name: str) -> None:
    """A past token that is masked is not seen, whatever the cache is called."""
    model, ids = tiny("llama"), prompt(20)
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, 3:6] = 0
    last = {"attention_mask": mask, "position_ids": torch.tensor([[19]])}
    plain = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :19], **versions.with_cache({}, plain))
        expected = model(ids[:, 19:], **versions.with_cache(last, plain)).logits
    with reasonalloc.attach(model, budget=64, interval=8) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(ids[:, :19], **{name: cache})
        found = model(ids[:, 19:], **last, **{name: cache}).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_foreign_caches_are_refused_under_both_names(name: str) -> None:
    model = tiny("llama")
    with reasonalloc.attach(model, budget=16, interval=8) as attached:
        for foreign in (DynamicCache(config=model.config), DynamicCache()):
            with pytest.raises(UsageError, match="DynamicCache, which would not be compressed"):
                model.generate(prompt(20), **{name: foreign}, **GREEDY)
            with pytest.raises(UsageError, match="DynamicCache, which would not be compressed"):
                model(prompt(20), **{name: foreign})
        caches = {n: attached.new_cache() for n in NAMES}
        for call in (model, model.generate):
            with pytest.raises(UsageError, match="past_key_values and cache are two caches"):
                call(prompt(20), **caches)


@pytest.mark.parametrize("kind", ["static", "compile"])
def test_steps_are_static_on_every_release(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[BudgetCache] = []
    run = step.StaticStep._run

    def noted(self: Any) -> Any:
        runs.append(self._cache)
        return run(self)

    monkeypatch.setattr(step.StaticStep, "_run", noted)
    with reasonalloc.attach(model := tiny("llama"), budget=16, interval=8, step=kind):
        model.generate(prompt(20), **GREEDY)
    assert len(runs) == (19 if kind == "static" else 3)


def test_own_calls_use_nothing_deprecated(no_deprecations: None) -> None:
    model = tiny("llama")
    ids = prompt(30)[0].tolist()
    text = Trajectory(tuple(ids[:20]), tuple(ids[20:]))
    assert torch.cat(list(replay_logits(model, text, None))).shape[0] == 10
    one_step(model, DynamicCache(config=model.config), prompt(3))
    assert all(check.passed for check in self_test("auto", "cpu"))


def test_untested_releases_are_told_once(anew: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.transformers, "__version__", "5.999.1.dev0")
    with pytest.warns(UntestedVersion) as caught:
        for _ in range(3):
            reasonalloc.attach(tiny("llama"), budget=16).detach()
    (warning,) = caught
    assert warning.filename == __file__
    for part in ("5.999.1.dev0", versions.NEWEST_TESTED, "reasonalloc doctor", "report"):
        assert part in str(warning.message)


@pytest.mark.parametrize(
    ("version", "known"),
    [
        (versions.NEWEST_TESTED + ".0", True),
        (versions.NEWEST_TESTED + ".7", True),
        ("5.12.1", True),
        ("5.9.0", True),
        ("5.999.0", False),
        ("5.999.0.dev0", False),
        ("5.999rc1", False),
        ("6.0.0", False),
    ],
)
def test_what_is_untested(version: str, known: bool) -> None:
    assert (versions.untested(version) is None) is known


def test_the_newest_release_is_the_tested_one() -> None:
    """`make test-newest` sets the variable: what is on the index today must have been tested."""
    installed = importlib.metadata.version("transformers")
    note = versions.untested(installed)
    assert note is None, (
        f"transformers {installed} is out: read its changes, mend what fails here, then raise "
        "NEWEST_TESTED in integrations/hf/versions.py"
    )
    if os.environ.get("REASONALLOC_NEWEST"):
        tested = ".".join(installed.split(".")[:2])
        assert tested == versions.NEWEST_TESTED, f"{tested} is installed, NEWEST_TESTED differs"
