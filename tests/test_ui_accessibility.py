"""axe finds nothing: six states of the page, a desk and a phone, light and dark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, expect

from serve.values import Progress
from tests.browser import BOX, DESKTOP, PHONE, Reader, chromium
from tests.page_server import PageServer, start

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting'"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]

AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
SMALLEST = """() => [...document.querySelectorAll('#shell button, #shell select, summary')]
  .filter(n => n.checkVisibility() && !n.matches('.upload-container'))
  .map(n => [n.getBoundingClientRect(), n.id || n.ariaLabel || n.textContent])
  .filter(([box]) => box.width > 0).map(([box, name]) => [Math.min(box.width, box.height), name])
  .sort((a, b) => a[0] - b[0])[0]"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    running = start(tmp_path_factory.mktemp("page"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def loading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    running = start(tmp_path_factory.mktemp("page"), is_ready=False)
    running.service.report(Progress("downloading", "m", "hub", 79, 138, 1e6, 70.0))
    yield running
    running.close()


def empty(who: Reader) -> None:
    pass


def answered(who: Reader) -> None:
    for scene in ("think", "code", "maths", "table", "tool"):
        who.ask(scene)
    who.page.locator(".thoughts summary").first.click()


def running(who: Reader) -> None:
    who.send("hang")
    expect(who.last.locator(".words")).to_have_text("And then ")


def failed(who: Reader) -> None:
    who.ask("middle")
    who.page.keyboard.press("ArrowUp")
    expect(who.page.locator(".editor")).to_be_visible()


def panels(who: Reader) -> None:
    who.ask("hello")
    who.page.click("#open-api")
    who.page.click("#key-show")
    expect(who.page.locator("#key-value")).not_to_contain_text("•")


STATES: list[Callable[[Reader], None]] = [empty, answered, running, failed, panels]


def violations(who: Reader) -> list[str]:
    who.page.evaluate(AXE)
    found: list[dict[str, Any]] = who.page.evaluate("async () => (await axe.run()).violations")
    return [f"{v['id']}: {n['html'][:160]} {n['any'][:1]}" for v in found for n in v["nodes"]]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["1280", "360"])
def test_axe_finds_nothing_in_any_state(
    browser: Browser, ready: PageServer, loading: PageServer, size: dict[str, int], theme: str
) -> None:
    found: dict[str, list[str]] = {}
    with Reader(browser, ready.url, viewport=size, color_scheme=theme) as who:
        for state in STATES:
            if state is not empty:
                who.page.evaluate("() => document.querySelector('#new-chat').click()")
            state(who)
            found[state.__name__] = violations(who)
            if who.page.locator("#shell.running").count():
                who.page.keyboard.press("Escape")
                who.wait_for_end()
        for tab in ("#tab-settings", "#tab-chats"):
            who.page.click(tab)
            found[tab] = violations(who)
    with Reader(browser, loading.url, viewport=size, color_scheme=theme) as who:
        expect(who.page.locator("#banner progress")).to_be_visible()
        found["loading"] = violations(who)
    assert {state: names for state, names in found.items() if names} == {}


def test_nothing_is_too_small_for_a_finger(browser: Browser, ready: PageServer) -> None:
    with Reader(browser, ready.url, viewport=PHONE, has_touch=True, is_mobile=True) as who:
        for scene in ("think", "code"):
            who.page.fill(BOX, scene)
            who.page.locator("#composer .submit-button").tap()
            who.page.wait_for_timeout(200)
            who.wait_for_end()
        smallest, name = who.page.evaluate(SMALLEST)
        assert smallest >= 40, name
    with Reader(browser, ready.url) as who:
        who.ask("code")
        smallest, name = who.page.evaluate(SMALLEST)
        assert smallest >= 24, name
