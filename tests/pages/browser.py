"""A real browser, and what a person sees in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

if not os.environ.get("CI"):
    pytest.importorskip("selenium")

from selenium.common.exceptions import TimeoutException
from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

SECONDS = 30.0
_QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--force-device-scale-factor=1", "--disable-quic", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
_SEEN = Path(__file__).with_name("seen.js").read_text("utf-8")


class Browser:
    """One tab; pages are files."""

    def __init__(self, driver: Chrome) -> None:
        self.driver = driver

    def open(self, page: Path, width: int = 1280, *, dark: bool = False) -> None:
        """Open a page at a width, and wait until its plots are drawn."""
        self.driver.get("about:blank")
        self.prefer(dark)
        self.size(width)
        for log in ("browser", "performance"):
            self.driver.get_log(log)  # what is read is forgotten
        self.driver.get(page.as_uri())
        self.js(_SEEN)
        self.until("return document.readyState === 'complete' && seen.drawn()")

    def size(self, width: int) -> None:
        """A window of that width; a narrow one is a phone's, where the viewport's meta counts."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, dark: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def js(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def until(self, script: str, *arguments: object) -> Any:
        """Wait until the script returns something true."""
        wait = WebDriverWait(self.driver, SECONDS, poll_frequency=0.05)
        return wait.until(lambda _: self.js(script, *arguments), f"never true: {script}")

    def settles(self, script: str, wanted: object) -> Any:
        """What the script returns once that is what is wanted, or else at the end of the time."""
        with suppress(TimeoutException):
            wait = WebDriverWait(self.driver, SECONDS, poll_frequency=0.05)
            wait.until(lambda _: self.js(script) == wanted)
        return self.js(script)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        """What can be read in each element, spaces and line ends as one space."""
        found = self.driver.find_elements("css selector", selector)
        return [" ".join(element.text.split()) for element in found]

    def table(self, selector: str) -> list[list[str]]:
        """Cells of all rows, the head first."""
        return self.js("return seen.table(arguments[0])", selector)

    def text(self, selector: str) -> str:
        (text,) = self.texts(selector)
        return text

    def choose(self, selector: str, label: str) -> None:
        """Choose the option of a list by what it says."""
        Select(self.find(selector)).select_by_visible_text(label)

    def focus(self, selector: str) -> None:
        self.js("document.querySelector(arguments[0]).focus()", selector)

    def keys(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def click(self, selector: str) -> None:
        self.point(selector, 0.5, 0.5).click().perform()

    def point(self, selector: str, right: float, down: float) -> ActionChains:
        """The mouse moves over an element, to shares of its width and height."""
        x, y = self.js(
            "const box = document.querySelector(arguments[0]);"
            "box.scrollIntoView({block: 'center'}); const at = box.getBoundingClientRect();"
            "return [at.left + at.width * arguments[1], at.top + at.height * arguments[2]]",
            selector,
            right,
            down,
        )
        actions = ActionChains(self.driver, duration=50)
        actions.w3c_actions.pointer_action.move_to_location(round(x), round(y))
        return actions

    def hover(self, plot: str, right: float, down: float) -> str:
        """What the label of a plot says under the mouse."""
        self.point("footer", 0.5, 0.5).perform()  # away from all plots
        self.until("return !document.querySelector('.hovertext')")
        self.point(f"#{plot} .nsewdrag", right, down).perform()
        return str(self.until("return seen.label(arguments[0])", plot))

    def errors(self) -> list[str]:
        """Messages of the console, warnings as well."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the page was opened, data inside it left out."""
        log = self.driver.get_log("performance")
        messages = [json.loads(entry["message"])["message"] for entry in log]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        urls = [params["request"]["url"] for params in sent]
        return [url for url in urls if not url.startswith("data:")]


@contextmanager
def started(binary: str, driver: str, profile: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile and end it."""
    options = ChromeOptions()
    options.binary_location = binary
    for argument in (*_QUIET, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options, Service(driver))
    try:
        yield Browser(chrome)
    finally:
        chrome.quit()
