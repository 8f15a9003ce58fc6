"""The report's page: tables, controls, chains."""

from __future__ import annotations

import csv
from typing import Any

import pytest
from browser import Browser
from made_pages import Pages, report_rows

CELLS = [
    ("full", None),
    *((arm, b) for b in (128, 256) for arm in ("rkv", "reasonalloc", "snapkv")),
]


def name(arm: str, budget: int | None) -> str:
    return "full cache" if budget is None else f"{arm}, budget {budget}"


def samples(arm: str, budget: int | None, problem: str | None = None) -> list[dict[str, Any]]:
    found = [r for r in report_rows() if (r["arm"], r["budget"]) == (arm, budget)]
    return [r for r in found if problem is None or r["problem"] == problem]


@pytest.fixture(scope="module")
def report(browser: Browser, pages: Pages) -> Browser:
    browser.open(pages.report)
    return browser


def test_the_tables_say_what_was_measured(report: Browser, pages: Pages) -> None:
    assert report.driver.title == "Evaluation under a KV budget"
    assert report.texts("h1, h2") == [
        "Evaluation under a KV budget",
        "made/up-1b, math500",
        "made/up-" + "long" * 12 + ", math500",
    ]
    head, full, *rows = report.table(".scroll[aria-labelledby=h-table-0] table")
    assert head == ["method", "budget 128", "budget 256"]
    assert full[0] == "full cache" and full[1].startswith(f"{share('full', None):.1f} % ")
    assert [row[0] for row in rows] == ["rkv", "reasonalloc", "snapkv"]
    for arm, *cells in rows:
        for budget, cell in zip((128, 256), cells, strict=True):
            assert cell.startswith(f"{share(arm, budget):.1f} % "), (arm, budget)
            assert cell.endswith("n = 10 \u00d7 2")

    with (pages.report.parent / "report-paired.csv").open() as file:
        compared = [row for row in csv.DictReader(file) if row["group"] == "0"]
    pairs = [row for row in compared if row["quantity"] == "correct"]
    _, *endings = report.table(".scroll[aria-labelledby=h-endings-0] table")
    assert len(endings) == len(compared) - len(pairs) > 0
    _, *paired = report.table(".scroll[aria-labelledby=h-paired-0] table")
    assert [[*row[:2], row[2].split(" points")[0], row[3]] for row in paired] == [
        [
            "full cache" if pair["arm"] == "full" else pair["arm"],
            pair["base_budget"] or pair["budget"],
            f"{100 * float(pair['difference']):+.1f}",
            f"{pair['better']} / {pair['worse']} of {pair['problems']}",
        ]
        for pair in pairs
    ]
    assert report.find("#group-1 .notice").text == (
        "The base arm rkv did not run here, so there is no paired table."
    )


def share(arm: str, budget: int | None) -> float:
    right = [sample["correct"] for sample in samples(arm, budget)]
    return 100 * sum(right) / len(right)


def test_bytes_are_the_axis(report: Browser) -> None:
    ticks = ["43", "85", "200"]  # 128, 256 and 600 tokens in 32 bits, of 600 in 16 bits
    assert report.texts("#by-bytes-0 .xtick text") == ticks
    axis = report.text("#by-bytes-0 .xtitle")
    assert axis == f"KV bytes, % of the 16-bit full cache at {length():.0f} tokens"
    assert report.text("#by-bytes-1 .xtitle") == "KV bytes per sequence"
    assert report.texts("#by-budget-0 .xtick text") == ["128", "256", "512", "1024"]


def length() -> float:
    """Mean length with the full cache."""
    full = [sample["completion_tokens"] + 9 for sample in samples("full", None)]
    return sum(full) / len(full)


def test_details_open_and_close(report: Browser) -> None:
    assert report.texts("#group-0 details table") == ["", ""]
    report.click("#group-0 section details summary")
    head, *rows = report.table("#group-0 section details table")
    assert head[:3] == ["method", "budget", "n"]
    assert [row[:2] for row in rows][: len(CELLS)] == [
        [arm, "none" if budget is None else str(budget)] for arm, budget in CELLS
    ]
    report.click("#group-0 section details summary")
    assert report.texts("#group-0 details table") == ["", ""]


def test_a_problem_is_chosen(report: Browser) -> None:
    report.choose("#left-0", name(*CELLS[0]))
    report.choose("#right-0", name(*CELLS[-1]))
    for problem in ("p3", "p7"):
        report.choose("#problem-0", problem)
        check_problem(report, problem, CELLS[0], CELLS[-1])
    report.choose("#left-0", "rkv, budget 128")
    report.choose("#right-0", "reasonalloc, budget 128")
    check_problem(report, "p7", ("rkv", 128), ("reasonalloc", 128))
    report.choose("#right-0", "rkv, budget 128")
    assert report.text("#parting-0") == "Both chains are the same."


def check_problem(report: Browser, problem: str, *pair: tuple[str, int | None]) -> None:
    """Counts of all cells, and the two chains with the place where they part."""
    counts = []
    for arm, budget in CELLS:
        right = [sample["correct"] for sample in samples(arm, budget, problem)]
        counts.append(f"{name(arm, budget)}: {sum(right)} of {len(right)} right")
    assert report.texts("#counts-0 span") == counts
    first = [samples(*cell, problem)[0] for cell in pair]
    for side, cell, sample in zip(("left", "right"), pair, first, strict=True):
        verdict = "right, answer 4" if sample["correct"] else "wrong, answer none"
        title = report.text(f"#{side}-title-0")
        assert title.startswith(f"{name(*cell)}: {verdict}, {sample['completion_tokens']} tokens")
        assert report.text(f"#{side}-text-0") == sample["completion"]
    left, right = (sample["completion"] for sample in first)
    same = next(i for i in range(len(left)) if left[i] != right[i])
    assert report.text("#parting-0").startswith(f"They part after {same} characters")
    assert report.texts("mark") == [text[same:].split()[0] for text in (left, right)]


def test_a_click_on_the_map_chooses_the_problem(report: Browser) -> None:
    ids = report.texts("#problem-0 option")
    report.choose("#problem-0", ids[0])
    report.choose("#left-0", name(*CELLS[0]))
    report.choose("#right-0", name(*CELLS[-1]))
    report.hover("problems-0", 0.65, 0.5)
    report.point("#problems-0 .nsewdrag", 0.65, 0.5).click().perform()
    report.until("return document.getElementById('problem-0').value === '6'")
    check_problem(report, ids[6], CELLS[0], CELLS[-1])


def test_the_map_of_heads_is_that_of_the_chosen_run(report: Browser) -> None:
    assert report.texts("#run-0 option") == [
        name(arm, budget) for arm in ("rkv", "reasonalloc") for budget in (128, 256)
    ]
    for run, budget in (("rkv, budget 128", 128), ("reasonalloc, budget 256", 256)):
        report.choose("#run-0", run)
        assert report.hover("heads-0", 0.1, 0.02) == (
            f"layer 0, KV head 0 at 128 tokens: {budget} kept"
        )
        assert report.hover("heads-0", 0.9, 0.98) == (
            f"layer 3, KV head 1 at 384 tokens: {budget - 9} kept"
        )


def test_groups_have_their_own_controls(report: Browser) -> None:
    report.choose("#problem-0", "p3")
    report.choose("#problem-1", "p2")
    assert report.texts("#counts-1 span") == ["random, budget 64: 0 of 1 right"]
    assert report.texts("#counts-0 span")[0].startswith("full cache: ")
    assert report.text("#prompt-0") == ""
    report.click("#group-1 section:last-of-type details summary")
    assert report.text("#prompt-1") == "What is p2? Right answer: 4"
    report.click("#group-1 section:last-of-type details summary")
