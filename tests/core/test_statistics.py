"""Statistics against known values and by simulation; reading result folders."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("scipy")

import numpy
from scipy.stats import t, ttest_1samp

from eval_folder import MANIFEST, made, row, rows, write
from reasonalloc.errors import UsageError
from reasonalloc.evaluation.intervals import (
    clustered_wilson,
    mean_interval,
    student_quantile,
    wilson,
)
from reasonalloc.evaluation.paired import compare, holm, verdict
from reasonalloc.evaluation.samples import load_groups
from reasonalloc.evaluation.statistics import by_cell, make_cell, pareto, pass_at_k


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (8, 1, 4), (6, 6, 2), (6, 0, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n: int, c: int, k: int) -> None:
    subsets = list(itertools.combinations(range(n), k))
    hits = sum(any(i < c for i in subset) for subset in subsets)
    assert pass_at_k(n, c, k) == pytest.approx(hits / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 4, 1), (3, 1, 0)])
def test_pass_at_k_refuses_what_is_no_draw(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="give no pass"):
        pass_at_k(n, c, k)


def test_one_sample_per_problem_gives_wilson() -> None:
    right = [[i % 3 == 0] for i in range(30)]
    found = make_cell(made("rkv", right)).accuracy
    assert (found.low, found.high) == pytest.approx(wilson(10, 30))
    assert found.value == pytest.approx(1 / 3)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 30, 199, 1318])
def test_students_quantile(freedom: int) -> None:
    assert student_quantile(freedom) == pytest.approx(t.ppf(0.975, freedom))


def test_samples_that_always_agree_count_once() -> None:
    once = clustered_wilson([1.0, 0.0, 0.0, 1.0, 0.0], 5)
    assert clustered_wilson([1.0, 0.0, 0.0, 1.0, 0.0], 40) == pytest.approx(once)
    assert clustered_wilson([0.5] * 5, 40) == pytest.approx(wilson(20, 40))
    assert clustered_wilson([1.0] * 5, 40) == pytest.approx(wilson(5, 5))
    for share in (0.0, 1.0):
        assert mean_interval([share] * 5, 40) == mean_interval([share] * 5, 5)


@pytest.mark.parametrize(("problems", "samples"), [(10, 4), (30, 1), (30, 8), (100, 8)])
def test_intervals_cover_the_truth(problems: int, samples: int) -> None:
    """Problems differ in difficulty; treating samples as independent would cover far less."""
    random = numpy.random.default_rng(0)
    hits = naive = 0
    for _ in range(300):
        chances = random.beta(0.5, 0.5, problems)
        right = random.random((problems, samples)) < chances[:, None]
        found = make_cell(made("rkv", right.tolist())).accuracy
        hits += found.low <= 0.5 <= found.high
        low, high = wilson(int(right.sum()), right.size)
        naive += low <= 0.5 <= high
    assert 0.91 <= hits / 300 <= 0.99
    if samples == 8:
        assert naive / 300 < 0.8


def test_paired_intervals_cover_the_truth_and_p_is_uniform() -> None:
    random = numpy.random.default_rng(1)
    hits = false = 0
    for _ in range(150):
        chances = random.beta(1, 1, 60)
        a = random.random((60, 3)) < numpy.clip(chances, 0, 0.9)[:, None]
        b = random.random((60, 3)) < numpy.clip(chances, 0, 0.9)[:, None]
        found = compare(made("a", a.tolist()), made("b", b.tolist()))
        assert found is not None
        hits += found.difference.low <= 0 <= found.difference.high
        false += found.p < 0.05
    assert hits / 150 >= 0.89
    assert false / 150 <= 0.10


def test_mcnemar() -> None:
    """10 discordant problems, 9 of them one way: 2 * 11 / 1024."""
    a = [[True]] * 9 + [[False]] + [[True]] * 20
    b = [[False]] * 9 + [[True]] + [[True]] * 20
    found = compare(made("a", a), made("b", b))
    assert found is not None and found.test == "McNemar, exact"
    assert found.p == pytest.approx(22 / 1024)
    assert (found.better, found.worse) == (9, 1)
    assert found.difference.value == pytest.approx(8 / 30)


def test_sign_flips_are_exact_for_few_problems() -> None:
    a, b = [[True, True]] * 5, [[False, True]] * 5
    found = compare(made("a", a), made("b", b))
    assert found is not None and found.p == pytest.approx(2 / 2**5)


def test_pairing_finds_what_the_intervals_alone_hide() -> None:
    base = [[i < 100] for i in range(200)]
    better = [[i < 112] for i in range(200)]
    found = compare(made("a", better), made("b", base))
    assert found is not None and holm([found])[0].clear
    assert make_cell(made("a", better)).accuracy.low < make_cell(made("b", base)).accuracy.high


def test_only_common_problems_are_compared() -> None:
    a = made("a", [[True]] * 6)
    b = made("b", [[True], [False], [False]])
    found = compare(a, b)
    assert found is not None and found.problems == 3
    assert compare(a, b[:1]) is None


def test_holm() -> None:
    found = compare(made("a", [[True]] * 4), made("b", [[False]] * 4))
    assert found is not None
    table = holm([replace(found, p=p) for p in (0.01, 0.04, 0.03, 0.005)])
    assert [row.adjusted for row in table] == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_as_many_problems_as_asked_for_settle_it() -> None:
    """Runs of that size, drawn from the measured problems, show the difference in 80 of 100."""
    kinds = [(1, 1)] * 330 + [(1, 0)] * 270 + [(0, 1)] * 220 + [(0, 0)] * 180
    a, b = [[bool(x)] for x, _ in kinds], [[bool(y)] for _, y in kinds]
    found = compare(made("a", a), made("b", b))
    assert found is not None and found.problems_needed is not None
    random = numpy.random.default_rng(2)
    gaps = numpy.array([x - y for x, y in kinds], dtype=float)
    draws = random.choice(gaps, (400, found.problems_needed))
    wins = ttest_1samp(draws, 0, axis=1).pvalue < 0.05
    assert 0.74 <= wins.mean() <= 0.86


def test_more_samples_help_where_sampling_is_the_noise() -> None:
    random = numpy.random.default_rng(3)
    a = random.random((200, 4)) < 0.55
    b = random.random((200, 4)) < 0.5
    found = compare(made("a", a.tolist()), made("b", b.tolist()))
    assert found is not None and found.samples_needed is not None
    needed = 0.4975 / (200 * (found.difference.value / 2.8016) ** 2)
    assert found.samples_needed == pytest.approx(needed, rel=0.2)
    mixed = [[i % 2 == 0] * 4 for i in range(50)], [[i % 2 == 1] * 4 for i in range(48)]
    found = compare(made("a", mixed[0]), made("b", [*mixed[1], [False] * 4, [False] * 4]))
    assert found is not None and found.samples_needed is None  # the problems themselves differ


def test_verdicts() -> None:
    same = compare(made("a", [[True], [False]] * 10), made("b", [[False], [True]] * 10))
    assert same is not None and "no difference; one below" in verdict(same)
    few = compare(made("a", [[True]] * 4), made("b", [[True]] + [[False]] * 3))
    assert few is not None and few.p == 0.25 and few.problems_needed == 8
    assert few.detectable is None and "about 8 problems" in verdict(few)
    idle = compare(made("a", [[True]] * 4), made("b", [[True]] * 4))
    assert idle is not None and "none could show" in verdict(idle)
    noisy = compare(
        made("a", [[True]] * 11 + [[False]] * 9), made("b", [[False]] * 10 + [[True]] * 10)
    )
    assert noisy is not None and "within noise" in verdict(noisy)
    assert f"{noisy.problems_needed:,} problems" in verdict(noisy)
    clear = compare(made("a", [[True]] * 20), made("b", [[False]] * 20))
    assert clear is not None and "more than noise" in verdict(clear)


def test_a_cell_counts_what_happened() -> None:
    samples = made("rkv", [[True, False], [True, True]], completion_tokens=50, finish="length")
    cell = make_cell(samples)
    assert (cell.problems, cell.samples, cell.cap_hits, cell.compressions) == (2, 4, 4, 48)
    assert sorted(cell.pass_at) == [1, 2]
    assert cell.pass_at[2].value == 1.0
    assert cell.tokens_per_second == pytest.approx(4 * 50 / (4 * 8.0 / 4))
    assert cell.tokens.value == 50 and cell.peak_bytes is None


def test_the_pareto_front() -> None:
    points = [(1.0, 0.2), (2.0, 0.5), (3.0, 0.4), (2.0, 0.3), (4.0, 0.5), (2.0, 0.5)]
    assert pareto(points) == [True, True, False, False, False, True]


def test_a_folder_is_read_line_by_line(tmp_path: Path) -> None:
    lines = rows(4, 2)
    folder = write(tmp_path / "a", lines)
    (group,) = load_groups([str(folder)])
    assert (group.model, group.task, len(group.samples)) == ("made/up-1b", "math500", len(lines))
    assert [s.row() for s in group.samples] == lines
    assert set(by_cell(group.samples)) == {
        ("full", None),
        ("rkv", 128),
        ("rkv", 256),
        ("reasonalloc", 128),
        ("reasonalloc", 256),
    }
    assert group.notices == ()


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", rows(3, 1))
    path = folder / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    (group,) = load_groups([str(folder)])
    assert len(group.samples) == len(rows(3, 1)) - 1
    assert "cut off" in group.notices[0]


def test_what_must_not_be_mixed_is_kept_apart(tmp_path: Path) -> None:
    first = write(tmp_path / "a", rows(3, 1, arms=("rkv",)))
    more = write(tmp_path / "b", rows(3, 1, arms=("snapkv",)), {**MANIFEST, "samples": 9})
    hot = write(tmp_path / "c", rows(3, 1), {**MANIFEST, "temperature": 1.0})
    big = write(tmp_path / "d", rows(3, 1), {**MANIFEST, "model": "made/up-7b"})
    groups = load_groups([str(f) for f in (first, more, hot, big, first)])
    assert [len(g.folders) for g in groups] == [2, 1, 1]
    assert {s.arm for s in groups[0].samples} == {"rkv", "snapkv"}
    assert groups[0].notices == ()


def test_profiles_are_kept_apart_and_other_machines_are_told(tmp_path: Path) -> None:
    def folder(name: str, arm: str, content: str = "", **changes: object) -> str:
        files = {arm: content} if content else {}
        manifest = {**MANIFEST, "arm_files": files, **changes}
        return str(write(tmp_path / name, rows(3, 1, arms=(arm,)), manifest))

    plain = folder("a", "rkv", device="cuda")
    first = folder("b", "reasonalloc", "1")
    second = folder("c", "reasonalloc", "2")
    third = folder("d", "best", "3")
    other = folder("e", "reasonalloc", "4", model="another")
    newer = folder("f", "random", code={"1": "0.1.0", "2": "0.1.0"})
    (group,) = load_groups([plain, first, third])
    assert group.notices == ("the folders differ in device: cpu, cuda",)
    assert len(load_groups([first, second])) == 2
    assert "the code changed" in load_groups([first, newer])[0].notices[-1]
    assert [g.protocol.get("arm_files") for g in load_groups([first, other])] == [None, None]


def test_samples_that_are_there_twice_count_once(tmp_path: Path) -> None:
    first = write(tmp_path / "a", rows(3, 1))
    copy = write(tmp_path / "b", rows(3, 1))
    (group,) = load_groups([str(first), str(copy)])
    assert len(group.samples) == len(rows(3, 1)) and "twice" in group.notices[0]


HEAD = json.dumps({"manifest": {}}) + "\n"
BROKEN = {
    "no manifest": "[1]\n",
    "not JSON": HEAD + "{oops\n",
    "missing field": HEAD + "{}\n",
    "bad number": HEAD + json.dumps(row("a", 1, "p", sample=-1)) + "\n",
    "bad truth": HEAD + json.dumps(row("a", 1, "p", correct=1)) + "\n",
    "no samples": HEAD,
    "empty": "",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folders_are_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "samples.jsonl").write_text(BROKEN[kind])
    with pytest.raises(UsageError, match=r"samples\.jsonl"):
        load_groups([str(tmp_path)])


def test_folders_without_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no folder"):
        load_groups([str(tmp_path / "none")])
    with pytest.raises(UsageError, match=r"has no samples\.jsonl"):
        load_groups([str(tmp_path)])


def test_wilson_takes_an_effective_number() -> None:
    low, high = wilson(2.5, 10.5)
    assert wilson(2, 10)[0] < low < high < wilson(3, 10)[1] + 0.01
    assert math.isclose(wilson(10.5, 10.5)[1], 1.0)


def test_samples_that_were_cut_are_compared_in_pairs() -> None:
    """10 discordant problems, 9 of them cut under the arm alone: as McNemar's test of answers."""
    ends = {"a": ["length"] * 9 + ["stop"], "b": ["stop"] * 9 + ["length"]}
    arm, base = (
        [
            replace(sample, finish=finish)
            for sample, finish in zip(made(name, [[True]] * 30), own + ["length"] * 20, strict=True)
        ]
        for name, own in ends.items()
    )
    found = compare(arm, base, "cut")
    assert found is not None and found.quantity == "cut"
    assert found.p == pytest.approx(22 / 1024) and found.difference.value == pytest.approx(8 / 30)
    assert (found.better, found.worse) == (1, 9)  # fewer cut samples are better
    assert "+26.7 points cut at the limit" in verdict(found)
    cell = make_cell(arm)
    assert cell.cut.value == pytest.approx(29 / 30) and cell.cap_hits == 29
    assert (cell.cut.low, cell.cut.high) == pytest.approx(wilson(29, 30))
    assert cell.went_on.value == 0 and cell.went_on.high == pytest.approx(wilson(0, 30)[1])
