"""The numbers that vLLM's scheduler and workers derive alike, and settings; without vLLM."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reasonalloc.errors import UsageError
from reasonalloc.integrations.vllm.checks import check_prompt, check_version
from reasonalloc.integrations.vllm.coding import Coding
from reasonalloc.integrations.vllm.layout import Layout, make_layouts
from reasonalloc.integrations.vllm.settings import VARIABLE, find_settings, with_settings
from reference import compression_points


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Layout, ...]:
    heads = draw(st.integers(1, 4))
    total = st.integers(heads * 4, heads * 60)
    # Pipeline-parallel stages have unequally many layers.
    ranks = draw(st.lists(st.lists(total, min_size=1, max_size=5), min_size=1, max_size=3))
    interval = draw(st.integers(1, 40))
    size = draw(st.sampled_from([1, 2, 16, 32]))
    return make_layouts(ranks, heads, interval, size, draw(st.booleans()))


@given(layouts(), st.integers(1, 300), st.integers(0, 400))
def test_events_are_those_of_the_other_engine(
    ranks: tuple[Layout, ...], prompt: int, steps: int
) -> None:
    points: set[int] = set()
    for layout in ranks:
        reserve = layout.reserve
        for layer, total in enumerate(layout.totals):
            # What is pinned is held besides: as if it were not there.
            pinned = prompt if reserve.pin else 0
            points_ = compression_points(
                total, layout.kv_heads, reserve.interval, prompt - pinned, steps
            )
            expected = [n + pinned for n in points_]
            boundaries = range(prompt, prompt + steps + 1, reserve.interval)
            assert [n for n in boundaries if layout.is_due(layer, prompt, n)] == expected
            if expected:
                assert layout.first_due(layer, prompt) == expected[0]
            points.update(expected)
    reserve = ranks[0].reserve
    assert reserve.compressions(prompt, prompt + steps) == len(points)
    if points:
        assert reserve.first_event(prompt) == min(points)


@given(layouts(), st.data())
def test_pages_hold_any_division_among_heads(
    ranks: tuple[Layout, ...], data: st.DataObject
) -> None:
    for layout in ranks:
        size, reserve = layout.reserve.block_size, layout.reserve
        used = 0
        for layer, total in enumerate(layout.totals):
            cuts = sorted(
                data.draw(
                    st.lists(
                        st.integers(0, total),
                        min_size=layout.kv_heads - 1,
                        max_size=layout.kv_heads - 1,
                    )
                )
            )
            shares = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
            rest = data.draw(st.integers(0, size - 1)) if reserve.pin else 0  # of a prompt
            need = sum(-(-(share + rest + reserve.interval) // size) for share in shares)
            assert need <= layout.pages()[layer]
            assert layout.offsets(0)[layer] == used
            used += layout.pages()[layer]
        assert used <= reserve.blocks * len(layout.totals) * layout.kv_heads


@given(layouts(), st.integers(1, 300))
def test_a_layer_that_still_fills_up_fits_its_pages(ranks: tuple[Layout, ...], prompt: int) -> None:
    for layout in ranks:
        size = layout.reserve.block_size
        first = layout.reserve.first_event(prompt)
        for layer in range(len(layout.totals)):
            if not layout.is_due(layer, prompt, first):
                until = layout.first_due(layer, prompt)
                until -= layout.reserve.leading(prompt) * size
                assert layout.kv_heads * -(-until // size) <= layout.pages()[layer]


@given(layouts(), st.integers(1, 300), st.integers(0, 500))
def test_the_peak_is_the_most_that_any_step_needs(
    ranks: tuple[Layout, ...], prompt: int, more: int
) -> None:
    reserve = ranks[0].reserve
    need = [reserve.needed(prompt, n) for n in range(1, prompt + more + 1)]
    assert reserve.peak(prompt, prompt + more) == max(need)
    first = reserve.first_event(prompt)
    rising = need[: min(first, len(need))]
    assert rising == sorted(rising)
    stay = prompt // reserve.block_size if reserve.pin else 0
    assert all(n == stay + reserve.blocks for n in need[first:])


def test_settings_come_from_the_engine_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert find_settings({}) is None
    assert find_settings({"reasonalloc": {"budget": 64, "arm": "full"}}) is None
    found = find_settings({"reasonalloc": {"budget": 64, "arm": "snapkv", "interval": 16}})
    assert found is not None
    assert (found.budget, str(found.arm), found.interval) == (64, "snapkv/uniform/uniform", 16)
    with pytest.raises(UsageError, match="did you mean 'reasonalloc'"):
        find_settings({"reasonaloc": {"budget": 64}})
    with pytest.raises(UsageError, match="not under 'reasonalloc'"):
        find_settings({"budget": 64, "arm": "rkv"})
    assert find_settings({"budget": 64, "of_another_plugin": True}) is None
    monkeypatch.setenv(VARIABLE, json.dumps({"budget": 32, "heads": "adakv"}))
    found = find_settings({})
    assert found is not None
    assert (found.budget, str(found.arm)) == (32, "rkv/uniform/adakv")
    # Other machines do not have the variable.
    carried = with_settings({"other": 1}, found)
    monkeypatch.delenv(VARIABLE)
    assert carried["other"] == 1
    assert find_settings(carried) == found
    assert with_settings(carried, found) == carried


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"arm": "rkv"}, "budget is missing"),
        ({"budget": 64, "intervall": 8}, "interval"),
        ({"budget": 64, "arm": "rkv", "heads": "adakv"}, "both given"),
        ({"budget": 64, "arm": "rkvv"}, "rkv"),
        ({"budget": "64"}, "budget='64'"),
        ({"budget": 64, "prompt": "keep"}, "unknown prompt 'keep'"),
        ({"budget": 64, "pin_turns": True}, "pin_turns"),
        ([64], "must be an object"),
    ],
)
def test_wrong_settings_are_refused(given: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        find_settings({"reasonalloc": given})


def test_a_variable_that_is_no_json_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "budget=64")
    with pytest.raises(UsageError, match="no JSON"):
        find_settings({})


def test_only_tested_versions_run() -> None:
    for version in ("0.32.0", "0.33.1", "0.33.0+cpu"):
        check_version(version)
    for version in ("0.31.2", "0.34.0", "1.0", "dev"):
        with pytest.raises(Exception, match="was not tested"):
            check_version(version)


def test_a_prompt_beyond_the_pool_is_named() -> None:
    reserve = make_layouts([[64, 64]], 1, 32, 16)[0].reserve
    assert check_prompt(160, reserve, 10, 1000) is None
    problem = check_prompt(161, reserve, 10, 1000)
    assert problem is not None
    assert "shorten it to 160 tokens" in problem


def test_a_pinned_prompt_beyond_the_pool_is_named() -> None:
    reserve = make_layouts([[64, 64]], 1, 32, 16, True)[0].reserve
    assert reserve.blocks == 7
    assert check_prompt(63, reserve, 10, 1000) is None
    problem = check_prompt(64, reserve, 10, 1000)
    assert problem is not None
    assert "shorten it to 63 tokens" in problem
    assert check_prompt(64, reserve, 10, 66) is None  # it never gets there


@given(layouts(), st.integers(1, 300), st.integers(1, 40), st.integers(0, 300))
def test_a_refusal_names_the_longest_prompt(
    ranks: tuple[Layout, ...], prompt: int, pool: int, answer: int
) -> None:
    reserve, last = ranks[0].reserve, 300 + answer
    problem = check_prompt(prompt, reserve, pool, last)
    if problem is None:
        assert reserve.needed(prompt, prompt) <= pool
        return
    assert "give the engine more KV cache memory" in problem
    longest = 0
    if "shorten it to" in problem:
        longest = int(problem.split("shorten it to ")[1].split()[0])
        assert check_prompt(longest, reserve, pool, last) is None
    assert check_prompt(longest + 1, reserve, pool, last) is not None


@given(
    st.lists(st.integers(20, 200), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(0, 300),
    st.sampled_from(["int8", "int4h", "int8:int4"]),
    st.booleans(),
    st.data(),
)
def test_coded_pages_hold_a_pinned_prompt_besides(
    totals: list[int], heads: int, start: int, kind: str, planned: bool, data: st.DataObject
) -> None:
    window, interval, size = 4, 16, 8
    cuts = [[max(total // heads, window)] * heads for total in totals]
    totals = [sum(own) for own in cuts]
    coding = Coding.of_kinds(
        [[kind] * heads] * len(totals),
        cuts if planned else None,
        window,
        (8, 8),
        torch.float32,
        size,
        1,
    )
    layout = make_layouts([totals], heads, interval, size, True, codings=[coding])[0]
    reserve, pages = layout.reserve, layout.pages(start)
    for layer, total in enumerate(totals):
        free = total - heads * window
        first = None if planned or heads == 1 else data.draw(st.integers(0, free))
        shares = [n - window for n in cuts[layer]]
        if first is not None:  # all that one head does not have goes to the last one
            shares = [first, *[0] * (heads - 2), free - first]
        row = coding.rows_of(layer)[0]
        tail = -(-(window + interval) // size)
        assert sum(row.pages(n + start) + tail for n in shares) <= pages[layer]
        assert max(row.pages(n + start) for n in shares) + tail <= layout.longest_run(start)
        assert max(shares) + start <= layout.most_coded(start)
        assert layout.offsets(start)[layer] == sum(pages[:layer])
    assert reserve.own(0) == reserve.blocks
    assert reserve.own(start) == -(-sum(pages) // (len(totals) * heads))
    assert (reserve.leading(start), reserve.first_event(max(start, 1))) == (0, max(start, 1))
