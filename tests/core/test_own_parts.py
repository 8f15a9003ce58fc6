"""Policies and allocators that are defined outside of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import reasonalloc
from models import prompt, tiny
from reasonalloc import Arm, UsageError
from reasonalloc.allocators.head import HEAD_ALLOCATORS, HeadAllocator, HeadQuery
from reasonalloc.allocators.layer import LAYER_ALLOCATORS, LayerAllocator, LayerQuery
from reasonalloc.parts import code_of
from reasonalloc.policies import POLICIES, Candidates, Policy
from reasonalloc.policies.rkv import RKV


@dataclass(frozen=True)
class EveryOther(Policy):
    """Tokens at even positions before those at odd ones."""

    step: int = 2
    weight: float = 1.0

    def score(self, candidates: Candidates) -> torch.Tensor:
        return self.weight * (candidates.positions % self.step == 0).float()


class FirstHeadMost(HeadAllocator):
    """Half for the first head, the rest for the others."""

    def allocate(self, query: HeadQuery) -> torch.Tensor:
        demand = torch.ones_like(query.lengths)
        demand[:, 0] = query.lengths.shape[1] - 1
        return query.divide(demand, query.floor(0.0, 0))


class LaterMore(LayerAllocator):
    """One token more per head in the last layer, one less in the first."""

    def allocate(self, query: LayerQuery) -> list[int]:
        totals = [query.kv_heads * query.budget] * query.layers
        totals[0] -= query.kv_heads
        totals[-1] += query.kv_heads
        return totals


class Remembered(Policy):
    """Holds a tensor, which no text can describe."""

    def __init__(self, favourite: torch.Tensor) -> None:
        self.favourite = favourite

    def score(self, candidates: Candidates) -> torch.Tensor:
        return torch.isin(candidates.positions, self.favourite).float()


def kept(**arm: Any) -> tuple[list[list[int]], str]:
    """Positions that the heads of the first layer kept at its last compression; the arm."""
    model = tiny("llama")
    settings: dict[str, Any] = {"budget": 12, "interval": 4, "window": 2, "record": "tokens"}
    with reasonalloc.attach(model, **settings, **arm) as attached:
        model.generate(prompt(20), max_new_tokens=9, do_sample=False)
        assert attached.recorder is not None
        event = [e for e in attached.recorder.events if e.layer == 0][-1]
        return [event.kept(0, head) for head in range(3)], str(attached.config.arm)


@pytest.mark.parametrize("policy", [EveryOther, EveryOther(), "every_other"])
def test_an_own_policy_works_at_once(policy: Any) -> None:
    if policy == "every_other":
        Arm(EveryOther)
    heads, arm = kept(policy=policy)
    assert arm == "every_other/uniform/uniform"
    for positions in heads:
        assert all(p % 2 == 0 for p in positions[:-2]) and positions[-2:] == [26, 27]


def test_parameters_are_part_of_the_name() -> None:
    assert kept(policy=EveryOther(3, 2))[1] == "every_other(step=3, weight=2.0)/uniform/uniform"
    assert kept(policy="every_other(step=3, weight=2.0)") == kept(policy=EveryOther(3, 2))
    assert Arm(RKV(lam=0.3)).policy == "rkv(lam=0.3)" and Arm(RKV()).policy == Arm(RKV).policy
    assert POLICIES.create("rkv(lam=0.3)") == RKV(lam=0.3)


def test_own_allocators() -> None:
    heads, arm = kept(heads=FirstHeadMost, layers=LaterMore())
    assert arm == "rkv/later_more/first_head_most"
    assert [len(positions) for positions in heads] == [17, 8, 8]


def test_objects_that_no_text_describes() -> None:
    first, second = (Remembered(torch.tensor(p)) for p in ([1, 5, 7], [2, 9]))
    heads, arm = kept(policy=first)
    assert arm.startswith("remembered/") and all({1, 5, 7} <= set(p) for p in heads)
    heads, arm = kept(policy=second)
    assert arm.startswith("remembered-2/") and all({2, 9} <= set(p) for p in heads)
    assert kept(arm="remembered/uniform/uniform")[0] == kept(policy=first)[0]


CELL = """
class Own(Policy):
    def score(self, candidates):
        return (candidates.positions == {favourite}).float()
"""


def test_a_cell_that_is_run_again_replaces_its_class() -> None:
    namespace: dict[str, Any] = {"Policy": Policy, "__name__": "__main__"}
    for favourite in (3, 8):
        exec(CELL.format(favourite=favourite), namespace)
        heads, arm = kept(policy=namespace["Own"]())
        assert arm == "own/uniform/uniform" and all(favourite in p for p in heads)


def test_classes_of_one_function_have_names_of_their_own() -> None:
    def made(favourite: int) -> type[Policy]:
        class Own(Policy):
            def score(self, candidates: Candidates) -> torch.Tensor:
                return (candidates.positions == favourite).float()

        return Own

    Arm(made(3))
    assert Arm(made(3)).policy == "own"
    with pytest.raises(UsageError, match="'own' is another one's name: rename the class"):
        Arm(made(8))


def test_what_is_no_policy_is_refused_in_one_line() -> None:
    class RKV(Policy):  # the name of another
        def score(self, candidates: Candidates) -> torch.Tensor:
            return candidates.positions.float()

    class Abstract(Policy):
        pass

    with pytest.raises(UsageError, match=r"'rkv' is another one's name: rename the class"):
        Arm(RKV)
    for wrong in (Abstract, 3, LaterMore()):
        with pytest.raises(UsageError, match=r"is no policy: give a name .* derives from Policy"):
            Arm(wrong)
    with pytest.raises(UsageError, match=r"'remembered' needs favourite: .* pass an object"):
        Arm(Remembered(torch.tensor([1])))
        POLICIES._objects.clear()
        POLICIES.create("remembered")
    with pytest.raises(UsageError, match="registered twice"):
        POLICIES.register("rkv", source="mine")(EveryOther)


def test_a_package_adds_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from reasonalloc import registry

    def points(**wanted: str) -> list[EntryPoint]:
        group = wanted["group"]
        values = {
            "reasonalloc.policies": "test_own_parts:EveryOther",
            "reasonalloc.head_allocators": "test_own_parts:FirstHeadMost",
            "reasonalloc.layer_allocators": "test_own_parts:Missing",
        }
        return [EntryPoint("theirs", values[group], group)]

    monkeypatch.setattr(registry, "entry_points", points)
    for known in (POLICIES, HEAD_ALLOCATORS, LAYER_ALLOCATORS):
        monkeypatch.setattr(known, "_loaded", False)
        monkeypatch.setattr(known, "_broken", {})
    assert type(POLICIES.create("theirs(step=3)")).__name__ == "EveryOther"
    assert "theirs" in HEAD_ALLOCATORS.entries()
    with pytest.warns(UserWarning, match="layer allocator 'theirs' of the package .* cannot be im"):
        LAYER_ALLOCATORS.entries()
    assert LAYER_ALLOCATORS.create("uniform").allocate(LayerQuery(1, 1, 8, 2)) == [8]
    with pytest.raises(UsageError, match="repair or uninstall that package"):
        LAYER_ALLOCATORS.create("theirs")


TYPED = """
{helper}
class Typed({base}):
    {attribute}
    def score(self, c, power={default}):
        return {sign}c.positions * 2.0 ** power + helper()
"""
DEFAULTS = {
    "helper": "def helper(): return 1",
    "base": "Policy",
    "attribute": "recent_fraction = 0.0",
    "default": "1",
    "sign": "",
}


@pytest.mark.parametrize(
    "change",
    [
        {"helper": "def helper(): return 2"},
        {"helper": "SCALE = 1\ndef helper(): return SCALE"},
        {"helper": "def helper(): return 1\nclass Base(Policy): pass", "base": "Base"},
        {"attribute": "recent_fraction = 0.5"},
        {"default": "3"},
        {"sign": "-"},
    ],
)
def test_other_code_is_another_method(change: dict[str, str]) -> None:
    def code(**parts: str) -> str:
        namespace: dict[str, Any] = {"Policy": Policy, "__name__": "__main__"}
        exec(TYPED.format(**{**DEFAULTS, **parts}), namespace)  # no source, as in an interpreter
        return code_of(Arm(namespace["Typed"]))

    assert code() == code() != code(**change)


def test_what_an_object_holds_is_part_of_its_method() -> None:
    one, same, other = (Arm(Remembered(torch.tensor([n]))) for n in (1, 1, 2))
    assert one == same != other and code_of(one) == code_of(same) != code_of(other)
    assert code_of(Arm("rkv", "pyramid", "adakv")) == ""
    POLICIES.register("rkv-mine", source="me")(EveryOther)
    assert code_of(Arm("rkv-mine")) != ""


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda q: None, "returned a NoneType: return int64 of shape"),
        (lambda q: q.lengths.float(), r"returned torch\.float32 of shape"),
        (lambda q: q.lengths - q.lengths.sum(), "must lie between"),
        (lambda q: q.lengths // 4, "must sum to"),
    ],
)
def test_budgets_of_an_own_allocator_are_checked(returned: Any, message: str) -> None:
    class Wrong(HeadAllocator):
        def allocate(self, query: HeadQuery) -> Any:
            return returned(query)

    with pytest.raises(UsageError, match=f"head allocator 'Wrong': .*{message}"):
        kept(heads=Wrong())


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda c: None, "returned a NoneType: return a tensor of shape"),
        (lambda c: c.positions[0].float(), r"of shape \[3, 20\]: return a tensor"),
        (lambda c: c.positions * torch.nan, "returned NaN"),
    ],
)
def test_scores_of_an_own_policy_are_checked(returned: Any, message: str) -> None:
    class Wrong(Policy):
        def score(self, candidates: Candidates) -> Any:
            return returned(candidates)

    with pytest.raises(UsageError, match=f"policy 'Wrong': .*{message}"):
        kept(policy=Wrong())


@pytest.mark.parametrize("totals", [None, [1.5], [36], [100, 8, 0, 36], "36"])
def test_totals_of_an_own_allocator_are_checked(totals: Any) -> None:
    class Wrong(LayerAllocator):
        def allocate(self, query: LayerQuery) -> Any:
            return totals

    with pytest.raises(UsageError, match=r"layers='wrong': what allocate\(\) returned"):
        kept(layers=Wrong())
