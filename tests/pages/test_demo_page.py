"""The demo's page: table, slider, choices."""

from __future__ import annotations

import pytest
from browser import Browser
from made_pages import ARMS, BUDGETS, COUNT, KV_HEADS, LAYERS, Pages, Recording
from selenium.webdriver.common.keys import Keys


def traced(pages: Pages, arm: str) -> Recording:
    return next(r for r in pages.results if r.job.arm == arm and r.job.budget == BUDGETS[0])


def holds(result: Recording, layer: int, head: int, read: int) -> tuple[set[int], int | None]:
    """What the head holds after so many tokens, and when it was compressed last."""
    past = [e for e in result.events if e.layer == layer and e.step <= read]
    if not past:
        return set(range(read)), None
    last = past[-1]
    return {*last.kept(0, head), *range(last.step, read)}, last.step


def check_chain(browser: Browser, pages: Pages) -> int:
    """Marks and text say what the chosen run's events say; returns the tokens read."""
    arm, layer, head, read = browser.js(
        "return ['arm', 'layer', 'head', 'step'].map((id) => Number(byId(id).value))"
    )
    held, last = holds(traced(pages, ARMS[arm]), layer, head, read)
    since = "never compressed so far" if last is None else f"last compressed at {last}"
    assert browser.text("#state") == (
        f"After {read} tokens, head {head} of layer {layer} still holds {len(held)} of them; "
        f"{since}."
    )
    states = [state for _, state in browser.js("return seen.chain()")]
    later = set(range(read, len(states)))
    assert {i for i, state in enumerate(states) if state == "kept"} == held
    assert {i for i, state in enumerate(states) if state == "later"} == later
    assert set(states) <= {"kept", "evicted", "later"}
    return int(read)


@pytest.fixture(scope="module")
def demo(browser: Browser, pages: Pages) -> Browser:
    browser.open(pages.demo)
    return browser


def test_the_table_says_what_was_measured(demo: Browser, pages: Pages) -> None:
    assert demo.driver.title == "ReasonAlloc: what a KV budget does to reasoning"
    assert demo.texts("h1, h2") == [
        "What a KV budget does to reasoning",
        "Right answers",
        "Accuracy against budget and bytes",
        "The wave: what each layer demands",
        "Budgets per layer and head",
        "One chain, and what one head remembers of it",
    ]
    head, full, *rows, size = demo.table(".scroll[aria-labelledby=h-table] table")
    budgets = sorted(BUDGETS)
    assert head == ["method", *(f"budget {budget}" for budget in budgets)]
    assert full[0] == "full cache" and full[1].endswith("; 1.56 MiB per sequence")
    assert [row[0] for row in rows] == list(ARMS)
    right = {(r.job.arm, r.job.budget): sum(r.correct) for r in pages.results}
    most = {budget: max(right[arm, budget] for arm in ARMS) for budget in budgets}
    for arm, *cells in rows:
        for budget, cell in zip(budgets, cells, strict=True):
            share = f"{100 * right[arm, budget] / COUNT:.0f}\u2009%".replace("\u2009", " ")
            assert cell.startswith(share), (arm, budget)
            assert (" best " in cell) == (right[arm, budget] == most[budget]), (arm, budget)
            assert ("never compressed" in cell) == (budget == 128)
    assert size == ["KV bytes per sequence", *(f"{4 * budget} KiB" for budget in budgets)]

    assert not demo.find("details table").is_displayed()
    demo.click("summary")
    assert demo.find("details table").is_displayed()
    every = demo.table("details table")
    demo.click("summary")
    assert len(every) == 1 + len(pages.results)
    assert every[1] == ["none", "full cache", "8 of 8", "68 % to 100 %", "1,638,400", "944", "0"]


def test_the_slider_moves_by_keyboard(demo: Browser, pages: Pages) -> None:
    words = demo.js("return seen.chain()")
    demo.focus("#step")
    demo.keys(Keys.HOME)
    prompt = len(pages.results[0].prompts[0])
    assert check_chain(demo, pages) == prompt
    demo.keys(*[Keys.ARROW_RIGHT] * 3)
    assert check_chain(demo, pages) == prompt + 3
    demo.keys(*[Keys.PAGE_UP] * 4)
    assert prompt + 3 < check_chain(demo, pages) < len(words)
    demo.keys(Keys.END)
    assert check_chain(demo, pages) == len(words)


def test_the_slider_moves_by_mouse(demo: Browser, pages: Pages) -> None:
    prompt, end = (int(demo.find("#step").get_attribute(name)) for name in ("min", "max"))
    middle = (prompt + end) / 2
    demo.focus("#step")
    demo.keys(Keys.END)
    at = demo.point("#step", 0.99, 0.5)
    width = demo.find("#step").size["width"]
    at.click_and_hold().move_by_offset(round(-0.49 * width), 0).release().perform()
    assert abs(check_chain(demo, pages) - middle) < 0.03 * (end - prompt)


def test_play_moves_the_slider(demo: Browser, pages: Pages) -> None:
    prompt = int(demo.find("#step").get_attribute("min"))
    demo.focus("#step")
    demo.keys(Keys.HOME)
    demo.click("#play")
    value = "Number(document.getElementById('step').value)"
    demo.until(f"return {value} > arguments[0] + 2 && {value} < arguments[0] + 200", prompt)
    assert demo.text("#play") == "Pause"
    demo.click("#play")
    assert demo.text("#play") == "Play"
    read = check_chain(demo, pages)
    assert prompt < read < len(demo.js("return seen.chain()"))


def test_methods_layers_and_heads_are_chosen(demo: Browser, pages: Pages) -> None:
    demo.focus("#step")
    demo.keys(Keys.END)
    demo.choose("#arm", "reasonalloc (wrong)")
    assert demo.texts("#outcome") == ["answers it wrong"]
    wrong = demo.js("return getComputedStyle(document.querySelector('#text .off')).boxShadow")
    assert wrong == demo.js(
        "return getComputedStyle(document.querySelector('.legend .off')).boxShadow"
    )
    assert demo.texts("#text .off") == ["nothing"]
    for layer in map(str, range(LAYERS)):
        demo.choose("#layer", layer)
        demo.choose("#head", str(KV_HEADS - 1))
        assert f"head {KV_HEADS - 1} of layer {layer}" in demo.text("#state")
        check_chain(demo, pages)
    demo.choose("#arm2", "random (right)")
    check_chain(demo, pages)
    assert demo.texts("#outcome") == ["answers it right"] and demo.texts("#text .off") == []
    demo.choose("#arm", "snapkv (wrong)")
    check_chain(demo, pages)
    assert demo.js("return document.getElementById('arm2').value") == str(ARMS.index("snapkv"))


def test_plots_say_numbers_under_the_mouse(demo: Browser, pages: Pages) -> None:
    demo.choose("#arm", "reasonalloc (wrong)")
    # The first row and column: 28 tokens are kept by head 0 of layer 0.
    assert demo.hover("heads", 0.05, 0.05) == "layer 0, KV head 0 after 64 tokens: 28 kept"
    last = traced(pages, "reasonalloc").events[-1]
    kept = int(last.budgets[0, KV_HEADS - 1])
    assert demo.hover("heads", 0.97, 0.97) == (
        f"layer {LAYERS - 1}, KV head {KV_HEADS - 1} after {last.step} tokens: {kept} kept"
    )
    assert demo.hover("wave", 0.5, 0.95).startswith("layer 1: 40.3 tokens")
