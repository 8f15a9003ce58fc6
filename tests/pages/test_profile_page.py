"""The page of a profile: demand of layers, or costs of layers and heads."""

from __future__ import annotations

from browser import Browser
from made_pages import LAYERS, Pages


def test_demand(browser: Browser, pages: Pages) -> None:
    browser.open(pages.demand)
    assert browser.driver.title == "made/up-1b"
    assert browser.texts("h1, h2") == ["made/up-1b", "Demand of each layer"]
    assert browser.texts("#layers .xtick text") == ["0", "1", "2"]
    assert browser.texts(".facts li") == ["3 layers", "3 prompts", "8 steps each"]
    assert browser.table("table") == [
        ["layer", "mean over heads", "largest head", "prompts"],
        ["0", "120.5", "241.0", "100.5 to 140.5"],
        ["1", "40.2", "80.5", "20.2 to 60.2"],
        ["2", "300.0", "600.0", "280.0 to 320.0"],
    ]


def test_costs(browser: Browser, pages: Pages) -> None:
    browser.open(pages.costs)
    assert browser.driver.title == "<b>made/up & more-1b"
    assert browser.texts("h1, h2") == [
        "<b>made/up & more-1b",
        "Cost of each layer",
        "Cost of each KV head",
    ]
    assert browser.table("table") == [
        ["layer", "budget 16", "budget 32", "budget 64"],
        *[
            [str(layer), *(three_digits(3000 * (layer + 1) / b) for b in (16, 32, 64))]
            for layer in range(LAYERS)
        ],
    ]
    assert browser.texts("#heads .xtick text") == ["0", "1", "2"]
    # The map of heads is that of the chosen budget.
    assert browser.hover("heads", 0.1, 0.9) == "layer 0, KV head 0: 62.5"
    assert browser.hover("heads", 0.9, 0.1) == "layer 2, KV head 1: 375"
    browser.choose("#budget", "64")
    assert browser.hover("heads", 0.1, 0.9) == "layer 0, KV head 0: 15.63"


def three_digits(cost: float) -> str:
    return f"{cost:.0f}" if cost >= 100 else f"{cost:#.3g}"
