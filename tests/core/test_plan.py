"""``plan``: one object that says what a budget means for a model, before anything is loaded."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import made_costs
import made_statistics
import reasonalloc
from models import prompt, tiny
from reasonalloc import UnsupportedError, UsageError
from reasonalloc.calibrated import CostProfile, DemandProfile, ReadsCalibrated, open_calibrated
from reasonalloc.calibrated.demand import config_hash
from reasonalloc.calibrated.statistics import Statistics
from reasonalloc.planning import BudgetPlan, plan
from reasonalloc.planning.files import files_missing
from reasonalloc.planning.sharding import HeadShard
from reasonalloc.policies.rkv import RKV
from tiny_folder import save_tiny


def of(name: str = "llama", **settings: Any) -> BudgetPlan:
    return plan(tiny(name), **{"budget": 20, "interval": 8, **settings})


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_plan_says_what_attach_does(name: str) -> None:
    model, settings = tiny(name), {"budget": 20, "interval": 8, "arm": "h2o/pyramid/adakv"}
    made = plan(model, batch=2, tokens=50, **settings)
    assert made.dtype == model.dtype and made.batch == 2
    with reasonalloc.attach(model, **settings) as attached:
        assert (attached.totals, attached.planned) == (made.totals, made.planned)
        assert attached.totals_at(32) == made.totals_at(32)
        cache = attached.new_cache()
        model(prompt(50, 2), past_key_values=cache)
        assert cache.kv_bytes == made.memory().kv_bytes(50)
        assert cache.bookkeeping_bytes == made.memory().bookkeeping_bytes
    assert made.memory().full_bytes(50) == made.full_bytes(2, 50, 4)


def test_every_way_to_name_a_model(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    model = tiny("llama")
    named, path, config, whole = (
        plan(m, budget=20) for m in (str(folder), folder, model.config, model)
    )
    assert named.totals == path.totals and config.totals == whole.totals
    assert named.name == str(folder)
    assert plan(model, budget=20, dtype="bfloat16").dtype == torch.bfloat16


def test_arms_in_parts_and_as_objects() -> None:
    assert (
        str(of(policy=RKV(lam=0.2), layers="pyramid").config.arm) == "rkv(lam=0.2)/pyramid/uniform"
    )
    with pytest.raises(UsageError, match="arm='rkv' and layers='pyramid': give one of the two"):
        of(arm="rkv", layers="pyramid")
    with pytest.raises(UsageError, match="means no compression"):
        of(arm="full")
    with pytest.raises(TypeError, match="unexpected keyword argument 'intervall'"):
        of(intervall=3)


def test_everything_is_checked_when_it_is_made() -> None:
    with pytest.raises(UsageError, match="batch=0"):
        of(batch=0)
    with pytest.raises(UsageError, match="needs budgets per head"):
        of(heads="planned")
    with pytest.raises(UsageError, match="cannot be read"):
        of(arm="best", profile="/nowhere.json")
    with pytest.raises(UsageError, match="no effect"):
        of(profile="/nowhere.json")
    with pytest.raises(UsageError, match="profile=3 must be the path of a file"):
        of(profile=3)
    config = tiny("llama").config
    config.kv_lora_rank = 4
    with pytest.raises(UnsupportedError, match="latent attention"):
        plan(config, budget=20)


def test_parts_of_all_processes_are_the_whole() -> None:
    made = of(budget=21, layers="pyramid")
    parts = [made.parts(HeadShard(rank, 3)) for rank in range(3)]
    assert [sum(total for total, _ in layer) for layer in zip(*parts, strict=True)] == list(
        made.totals
    )


def test_it_shows_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = of(tokens=4096)
    made.show(memory=1 << 20)
    out = capsys.readouterr().out
    for part in ("full cache", "x smaller", "largest batch in 1.00 MiB", "Budget of each layer"):
        assert part in out
    assert "0-2 (each)" in made.table() and "0-2 (each)" in made._repr_html_()
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    made.show()
    assert capsys.readouterr().out == made.table() + "\n"
    markup = dataclasses.replace(made, name="<b>[/red]")
    assert "&lt;b&gt;" in markup._repr_html_() and "<b>[/red]" in markup.table()


def test_one_door_for_calibrated_files(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "file"
    mark = config_hash(model.config.to_dict())
    demand = DemandProfile("tiny", mark, 0.9, 8, ["a"], [3.0], [4.0], [[3.0]])
    statistics = made_statistics.of_model(model)
    for made, kind, cls in (
        (demand, "demand", DemandProfile),
        (made_costs.make(3, 3, fingerprint=mark), "cost", CostProfile),
        (statistics, "statistics", Statistics),
    ):
        made.save(path)
        back = open_calibrated(path)
        assert isinstance(back, cls) and back.kind == made.kind == kind
        assert "<table>" in back._repr_html_() and back.table() == made.table()
    path.write_text("hello")
    with pytest.raises(UsageError, match="is no JSON file and holds no statistics"):
        open_calibrated(path)
    with pytest.raises(UsageError, match="cannot be read"):
        open_calibrated(tmp_path / "none")


def test_own_parts_may_read_a_calibrated_file() -> None:
    from reasonalloc.config import Arm
    from reasonalloc.policies import POLICIES, Policy

    @dataclasses.dataclass(frozen=True)
    class MineReads(ReadsCalibrated, Policy):
        """Reads costs."""

        weight: float = 1.0
        reads = "cost profile"

        def score(self, candidates: Any) -> Any:
            raise NotImplementedError

    arm = Arm(MineReads)
    assert files_missing(arm) == {"policy": "cost profile"}
    assert files_missing(Arm("mine_reads(path=x.json)")) == {}
    assert POLICIES.create("mine_reads(x.json)").path == "x.json"
