"""The explorer in a browser: mouse, keyboard, windows, reloads and failures, as a person meets them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

import assay
from assay.budget.plan import Plan
from assay.explore.server import Server
from assay.explore.state import State

pytest.importorskip("selenium", reason="selenium is not installed")

from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Page]:
    """A fresh window; what its console said must be nothing."""
    browser.get("about:blank")
    browser.get_log("browser")
    shown = Page(browser, server)
    yield shown
    assert browser.get_log("browser") == []


class Page:
    """The page as a person sees it."""

    def __init__(self, browser: Any, server: Server) -> None:
        self.browser, self.server = browser, server
        self.load(server.address)

    def load(self, address: str) -> None:
        """Open an address and wait until the first plan is there."""
        self.browser.get(address)
        self.until(lambda: self.browser.execute_script("return document.body.dataset.ready") == "yes")

    def until(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        """Wait for something to become true."""
        return WebDriverWait(self.browser, seconds, 0.02, [StaleElementReferenceException]).until(lambda _: condition())

    def find(self, name: str) -> Any:
        """An element by its id."""
        return self.browser.find_element(By.ID, name)

    def text(self, name: str) -> str:
        """What it says."""
        return str(self.find(name).text)

    def value(self, name: str) -> float:
        """The number in a field."""
        return float(self.find(name).get_attribute("value"))

    @property
    def state(self) -> dict[str, Any]:
        """What the window shows, from its address; empty before it stands there."""
        found = unquote(self.browser.execute_script("return location.hash").removeprefix("#"))
        return json.loads(found)["state"] if found else {}

    def agrees(self) -> bool:
        """Whether the figures are those of the slider's budget."""
        wanted = self.state
        if not wanted or not wanted["bits"] == self.value("slide") == self.value("bits"):
            return False
        answer = self.server.session.answer(State.parse(json.dumps(wanted)))
        return self.text("f-bits") == f"{answer['bits']:.3f}"

    def settle(self) -> None:
        """Wait until the figures are those of the slider."""
        self.until(self.agrees)

    def tab_to(self, name: str) -> Any:
        """Press Tab until the element that has the id, or lies in it, is reached; returns it."""
        script = "return document.activeElement.closest('#' + arguments[0]) !== null"
        for _ in range(120):
            if self.browser.execute_script(script, name):
                return self.browser.switch_to.active_element
            self.press(Keys.TAB)
        raise AssertionError(f"Tab doesn't reach {name}")

    def mouse(self, kind: str, at: dict[str, float], share: float) -> None:
        """What the left button does at a share of the width of a box."""
        x, y = at["x"] + share * at["width"], at["y"] + at["height"] / 2
        event = {"type": kind, "x": x, "y": y, "button": "left", "buttons": 1, "clickCount": 1}
        self.browser.execute_cdp_cmd("Input.dispatchMouseEvent", event)

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus."""
        ActionChains(self.browser).send_keys(*keys).perform()


def test_figures_follow_while_the_slider_is_held(page: Page) -> None:
    page.settle()
    seen = [page.text("f-kl")]
    slide = page.find("slide").rect
    page.mouse("mousePressed", slide, 0.1)
    for share in (0.3, 0.5, 0.7):
        page.mouse("mouseMoved", slide, share)
        page.until(lambda: page.text("f-kl") != seen[-1] and page.agrees())
        seen.append(page.text("f-kl"))
    page.mouse("mouseReleased", slide, 0.7)
    means = [float(text.split()[0]) for text in seen]
    assert means == sorted(means, reverse=True) and len(set(means)) == 4
    assert page.value("bits") > 6


def test_keyboard_alone_budgets_pins_and_saves(page: Page, tmp_path: Path) -> None:
    page.settle()
    before = page.value("slide")
    page.tab_to("slide")
    page.press(*[Keys.ARROW_RIGHT] * 30)
    page.settle()
    assert page.value("bits") == pytest.approx(before + 0.3, abs=0.02)
    page.tab_to("map")
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    cell = page.browser.switch_to.active_element
    index = int(cell.get_attribute("data-cell"))
    assert page.server.session.cells.names[index] == ("1", "attn.k")
    assert page.text("cell").startswith("block 1, attn.k: ")
    page.press(Keys.ENTER)
    page.until(lambda: page.find("detail").is_displayed())
    for _ in range(3):
        button = page.tab_to("d-options")
        if button.tag_name == "button":
            break
        page.press(Keys.TAB)
    level = button.get_attribute("data-level")
    page.press(Keys.ENTER)
    page.until(lambda: page.text("pins") == f"block 1, attn.k: {level} remove")
    page.until(lambda: "pinned" in cell.get_attribute("class"))
    page.tab_to("path")
    page.press(str(tmp_path / "typed.yaml"), Keys.ENTER)
    page.until(lambda: page.text("saved").startswith(f"Saved {tmp_path / 'typed.yaml'}"))
    plan = Plan.load(tmp_path / "typed.yaml")
    assert plan.choices["model.layers.1.self_attn.k_proj.weight"].level == level
    assert plan.budget["bits"] == page.value("bits")


def test_a_pin_for_a_role_is_set_and_taken_away_with_the_mouse(page: Page) -> None:
    page.settle()
    free = page.text("f-kl")
    page.browser.find_element(By.CSS_SELECTOR, "#map td[data-cell]").click()
    page.until(lambda: page.find("detail").is_displayed())
    page.find("d-reach").send_keys("this role")
    page.browser.find_elements(By.CSS_SELECTOR, "#d-options button")[-1].click()
    page.until(lambda: page.text("pins").startswith("every block, attn.q: "))
    page.until(lambda: len(page.browser.find_elements(By.CSS_SELECTOR, "#map td.pinned")) == 2)
    page.until(lambda: page.text("f-kl") != free)
    page.browser.find_element(By.CSS_SELECTOR, "#pins button").click()
    page.until(lambda: page.text("f-kl") == free and not page.browser.find_elements(By.CSS_SELECTOR, "#map td.pinned"))


def test_a_reload_keeps_budget_engine_pins_and_the_plan_compared_with(page: Page, tmp_path: Path) -> None:
    page.settle()
    page.find("path").send_keys(str(tmp_path / "first.yaml"), Keys.ENTER)
    page.until(lambda: "Saved" in page.text("saved"))
    page.find("other").send_keys(str(tmp_path / "first.yaml"), Keys.ENTER)
    page.until(lambda: page.find("versus").is_displayed())
    page.find("bits").clear()
    page.find("bits").send_keys("6.5", Keys.TAB)
    page.settle()
    page.find("engine").send_keys("vllm")
    page.until(lambda: page.find("error").text == "" and page.state["engine"] == "vllm" and page.agrees())
    page.find("out").send_keys("result", Keys.TAB)
    shown = {name: page.text(name) for name in ("f-bits", "f-size", "f-kl", "f-uniform", "f-cache", "f-memory", "versus", "by")}
    assert "has changed since it was saved" in shown["by"]
    page.load(page.browser.current_url)
    page.browser.refresh()
    page.until(lambda: page.browser.execute_script("return document.body.dataset.ready") == "yes")
    page.settle()
    assert {name: page.text(name) for name in shown} == shown
    assert page.find("engine").get_attribute("value") == "vllm" and page.find("out").get_attribute("value") == "result"


def test_two_windows_are_independent(page: Page) -> None:
    page.settle()
    first, figures = page.browser.current_window_handle, page.text("f-kl")
    page.browser.switch_to.new_window("window")
    try:
        page.load(page.server.address)
        page.find("bits").clear()
        page.find("bits").send_keys("7.5", Keys.TAB)
        page.settle()
        second = page.text("f-kl")
        assert second != figures
        page.browser.switch_to.window(first)
        page.browser.refresh()
        page.until(lambda: page.browser.execute_script("return document.body.dataset.ready") == "yes")
        page.settle()
        assert page.text("f-kl") == figures
        page.browser.switch_to.window(page.browser.window_handles[1])
        assert page.text("f-kl") == second
    finally:
        page.browser.close()
        page.browser.switch_to.window(first)


def test_a_wrong_token_shows_nothing_of_the_page(browser: Any, server: Server) -> None:
    browser.get(server.address.replace(server.token, "~" + server.token[1:]))
    assert browser.find_element(By.TAG_NAME, "body").text.startswith('{"error":"not allowed"}')
    assert not browser.find_elements(By.ID, "slide")
    browser.get_log("browser")


@pytest.mark.parametrize("text", ["", "no: plan", "\x00"])
def test_a_bad_plan_is_one_line_and_the_page_goes_on(page: Page, tmp_path: Path, text: str) -> None:
    page.settle()
    (tmp_path / "bad.yaml").write_text(text)
    page.find("other").send_keys(str(tmp_path / "bad.yaml"), Keys.ENTER)
    page.until(lambda: "not a plan" in page.text("compared"))
    assert not page.find("versus").is_displayed()
    page.find("slide").send_keys(Keys.ARROW_RIGHT)
    page.settle()
    page.browser.get_log("browser")


def test_what_is_out_of_reach_says_so_and_a_later_choice_recovers(page: Page) -> None:
    page.settle()
    shown = page.text("f-kl")
    page.find("bits").clear()
    page.find("bits").send_keys("0.2", Keys.TAB)
    page.until(lambda: "0.2 bits are out of reach" in page.text("error"))
    assert page.text("f-kl") == shown
    page.find("slide").send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: page.text("error") == "")
    page.settle()
    page.browser.get_log("browser")


def test_nothing_overflows_and_dark_is_dark(page: Page) -> None:
    for width in (400, 1400):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    grounds = []
    for scheme in ("light", "dark"):
        page.browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        grounds.append(page.browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert grounds == ["rgb(255, 255, 255)", "rgb(13, 17, 23)"]


def test_a_server_that_is_gone_is_said(page: Page) -> None:
    page.settle()
    page.browser.execute_cdp_cmd("Network.enable", {})
    gone = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", gone)
    page.find("slide").send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: "assay explore has ended" in page.text("error"))
    page.browser.execute_cdp_cmd("Network.emulateNetworkConditions", gone | {"offline": False})
    page.find("slide").send_keys(Keys.ARROW_RIGHT)
    page.until(lambda: page.text("error") == "" and page.agrees())
    page.browser.get_log("browser")


def test_a_compression_is_started_followed_and_its_report_opened(
    page: Page, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(assay.__file__).parents[1]))
    page.settle()
    assert page.text("by") == "Save the plan first." and not page.find("start").is_enabled()
    assert page.find("model").get_attribute("value") == str(profile.parent / "m")
    page.find("path").send_keys(str(tmp_path / "plan.yaml"), Keys.ENTER)
    page.until(lambda: page.find("start").is_enabled())
    page.find("out").send_keys(str(tmp_path / "out"), Keys.ENTER)
    page.until(lambda: page.text("job-state").startswith(f"Compressing into {tmp_path / 'out'}"))
    assert not page.find("start").is_enabled() and page.find("cancel").is_displayed()
    page.until(lambda: page.text("job-state").startswith("Done in "), 60)
    assert "block-0001: " in page.text("job-lines")
    assert (tmp_path / "out" / "assay" / "ledger.json").exists()
    first = page.browser.current_window_handle
    page.browser.find_element(By.CSS_SELECTOR, "#job-report a").click()
    page.until(lambda: len(page.browser.window_handles) == 2)
    page.browser.switch_to.window(next(h for h in page.browser.window_handles if h != first))
    page.until(lambda: page.browser.find_elements(By.CSS_SELECTOR, "#ledger tbody tr"))
    assert page.browser.execute_script("return self.origin") == "null"
    assert page.browser.get_log("browser") == []
    page.browser.close()
    page.browser.switch_to.window(first)
    shutil.rmtree(tmp_path / "out")
