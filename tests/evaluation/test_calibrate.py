"""``calibrate``: every objective from Python, as the command measures it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models import prompt
from reasonalloc import UsageError
from reasonalloc.calibrated import CostProfile, open_calibrated
from reasonalloc.calibrated.costs import load_costs
from reasonalloc.calibrated.objectives import OBJECTIVES, CalibrationConfig
from reasonalloc.calibration import calibrate
from reasonalloc.calibration.joint import budgets_to_check
from reasonalloc.config import Arm, CompressionConfig
from reasonalloc.evaluation.replay import full_logits, measure_fidelity
from reasonalloc.loading import load_model
from reasonalloc.texts import Trajectory

TEXT = Trajectory(tuple(range(10, 35)), tuple(range(40, 75)))
COSTS = {"budgets": (8, 16), "interval": 8, "window": 4, "policy": "rkv", "check": ()}


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return load_model(str(folder), "float32", "cpu")


def silent(done: int, total: int) -> None:
    assert 0 < done <= total


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective(loaded: tuple[Any, Any], objective: str, tmp_path: Path) -> None:
    reads_texts = OBJECTIVES[objective].reads_texts
    texts: Any = [TEXT] if reads_texts else ["w1 w2 w3", torch.tensor([[5, 6, 7]])]
    options = COSTS if reads_texts else {"max_new_tokens": 20, "every": 8}
    out, said = tmp_path / f"o{OBJECTIVES[objective].suffix or '.json'}", []
    made = calibrate(
        *loaded, texts, objective=objective, out=out, progress=silent, tell=said.append, **options
    )
    assert open_calibrated(out).table() == made.table()
    assert any("tokens will run" in text for text in said) == reads_texts
    made.show()


def test_a_pinned_prompt_leaves_generated_tokens_to_the_budgets(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    """The budgets are those of the text after its prompt, in the check as well."""
    long = Trajectory(tuple(range(10, 35)), tuple(range(20, 96)))
    assert budgets_to_check([long], None, 8, 8, "pin") == [18]
    with pytest.raises(UsageError, match="75 tokens besides its prompt"):
        budgets_to_check([long], [76], 8, 8, "pin")
    cadence: dict[str, Any] = {"interval": 8, "window": 4}
    settings = cadence | {"policy": "rkv", "budgets": (8, 16, 32), "samples": 2}
    profiles = [
        calibrate(*loaded, [long], objective="fisher", prompt=mode, progress=silent, **settings)
        for mode in ("evict", "pin")
    ]
    full = full_logits(loaded[0], long)
    for profile, mode in zip(profiles, ("evict", "pin"), strict=True):
        assert isinstance(profile, CostProfile) and profile.prompt == mode
        profile.save(tmp_path / "costs.json")
        assert load_costs(str(tmp_path / "costs.json")) == profile
        for entry in profile.joint:
            config = CompressionConfig(int(entry["budget"]), Arm("rkv"), prompt=mode, **cadence)
            kl = measure_fidelity(loaded[0], long, full, config).kl
            assert entry["uniform"] == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    evicting, pinning = (torch.tensor(p.curves()).sum() for p in profiles)
    assert pinning < evicting
    data = json.loads((tmp_path / "costs.json").read_text())
    del data["prompt"]
    (tmp_path / "costs.json").write_text(json.dumps(data | {"version": 3}))
    assert load_costs(str(tmp_path / "costs.json")) == replace(profiles[1], prompt="evict")


def test_texts_come_from_a_file_or_as_its_lines(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    rows = [{"prompt": "w1 w2 w3", "completion": "w4 w5 " * 20, "kind": "up"}]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    settings: Any = {"objective": "fisher", "progress": silent, "samples": 1, **COSTS}
    one, two = (calibrate(*loaded, texts, **settings) for texts in (path, rows))
    assert one == two and one.kinds == ["up"] and one.interval == 8
    prompts = calibrate(*loaded, ["w1 w2"], generate=30, **settings)
    assert prompts.tokens == [29]


@pytest.mark.parametrize("objective", ["kl", "fisher"])
def test_texts_without_an_end_of_turn_are_noted(
    loaded: tuple[Any, Any], objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    settings: dict[str, Any] = {"objective": objective, "progress": silent, "tell": said.append}
    calibrate(*loaded, [TEXT], **settings, **COSTS)
    assert sum("no text has an end of turn" in line for line in said) == 1
    said.clear()
    monkeypatch.setattr(loaded[0].generation_config, "eos_token_id", TEXT.completion_ids[-1])
    calibrate(*loaded, [TEXT], **settings, **COSTS)
    assert said and not any("end of turn" in line for line in said)


def test_the_bar_is_tqdms(loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(*loaded, [TEXT], objective="kl", **COSTS)
    err = capsys.readouterr().err
    assert "Calibrating" in err and "note: " in err


def test_defaults_are_said_once() -> None:
    from inspect import signature

    from reasonalloc.calibration import ablation, attention_mass, fisher, statistics

    for measure in (ablation, attention_mass, fisher, statistics):
        for name, parameter in signature(measure).parameters.items():
            if name in CalibrationConfig.__dataclass_fields__ and name not in ("policy", "budgets"):
                assert parameter.default == getattr(CalibrationConfig, name), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "guess"}, "unknown objective 'guess'"),
        ({"rho": 0.5, "objective": "statistics"}, "rho has no effect with objective='statistics'"),
        ({"out": "/no/folder/x.json"}, "cannot be written"),
        ({"out": "x.txt", "objective": "kl"}, "ends in .json"),
        ({"texts": [" "]}, r"texts\[0\] has none of prompt"),
        ({"texts": ["x"], "objective": "kl"}, "texts has prompts without a completion"),
        ({"texts": [{"prompt": 3}], "objective": "kl"}, r"texts\[0\]: prompt must be text"),
        ({"texts": "/no/file"}, "texts='/no/file' cannot be read"),
    ],
)
def test_refusals(loaded: tuple[Any, Any], options: dict[str, Any], message: str) -> None:
    texts = options.pop("texts", [prompt(5)])
    with pytest.raises(UsageError, match=message):
        calibrate(*loaded, texts, **options)


def test_calibrated_before_a_broken_run_stays(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    out = tmp_path / "costs.json"
    out.write_text("old")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(*loaded, [TEXT], objective="kl", out=out, progress=stop, tell=print, **COSTS)
    assert out.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["costs.json"]
