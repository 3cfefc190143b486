"""axe finds nothing: each state of the page, on a desk and a phone, light and dark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, expect

from serve.values import Progress
from tests.browser import BOX, DESKTOP, PHONE, Reader, chromium
from tests.page_server import PageServer, offer, start

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
    offer(running, {"scripted/demo": False, "scripted/eyes": True})
    yield running
    running.close()


@pytest.fixture(scope="module")
def loading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    running = start(tmp_path_factory.mktemp("page"), is_ready=False)
    running.service.report(Progress("downloading", "m", "hub", 79, 138, 1e6, 70.0))
    yield running
    running.close()


@pytest.fixture(scope="module")
def page(browser: Browser, ready: PageServer) -> Iterator[Reader]:
    with Reader(browser, ready.url) as who:
        yield who


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


def attached(who: Reader) -> None:
    """A picture that the model cannot see, with the offer of one that does, and a cut chat."""
    for i in range(2):
        who.ask(f"part {i} " + "x" * 4500)
    who.send("now " + "y" * 9000)
    who.last.locator(".error button").click()
    who.wait_for_end()
    picture = str(Path(__file__).parent.parent / "assets" / "favicon.png")
    who.page.set_input_files("#composer input[type=file]", picture)
    expect(who.page.locator("#dock-notices button")).to_be_visible()


def menu(who: Reader) -> None:
    """A phone's menu behind the clip; on a desk it is closed."""
    who.ask("hello")
    who.page.set_viewport_size(PHONE)
    who.page.click("#composer .upload-button")
    expect(who.page.locator("#clip-menu")).to_be_visible()
    who.page.evaluate(AXE)
    assert who.page.evaluate("async () => (await axe.run()).violations") == []


def panels(who: Reader) -> None:
    who.ask("hello")
    who.page.click("#open-api")
    if "•" in who.page.locator("#key-value").inner_text():
        who.page.click("#key-show")
    expect(who.page.locator("#key-value")).not_to_contain_text("•")


STATES = [empty, answered, running, failed, panels, menu, attached]


WINDOWS = [(size, theme) for size in (DESKTOP, PHONE) for theme in ("light", "dark")]


def violations(who: Reader) -> dict[str, list[str]]:
    """What axe finds on the page as it stands, in each window and theme; {} where it finds nothing.
    The page changes in place, as it does when a window is made smaller or the night comes."""
    found = {}
    who.page.evaluate(AXE)
    for size, theme in WINDOWS:
        who.page.set_viewport_size(size)
        who.page.emulate_media(color_scheme=theme)
        expect(who.page.locator("html")).to_have_attribute("data-theme", theme)
        seen: list[dict[str, Any]] = who.page.evaluate("async () => (await axe.run()).violations")
        if seen:
            found[f"{size['width']} {theme}"] = [
                f"{v['id']}: {n['html'][:160]} {n['any'][:1]}" for v in seen for n in v["nodes"]
            ]
    who.page.set_viewport_size(DESKTOP)
    return found


@pytest.mark.parametrize("state", STATES)
def test_axe_finds_nothing(page: Reader, state: Callable[[Reader], None]) -> None:
    page.begin_again()
    state(page)
    assert violations(page) == {}


@pytest.mark.parametrize("tab", ["#tab-settings", "#tab-chats"])
def test_axe_finds_nothing_in_the_other_panels(page: Reader, tab: str) -> None:
    page.begin_again()
    panels(page)
    page.page.click(tab)
    assert violations(page) == {}


def test_axe_finds_nothing_while_a_model_loads(browser: Browser, loading: PageServer) -> None:
    with Reader(browser, loading.url) as who:
        expect(who.page.locator("#banner progress")).to_be_visible()
        assert violations(who) == {}


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
