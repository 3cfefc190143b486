"""The first box: what is typed and sent in it, however early, is neither lost nor sent twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.browser import BOX, DESKTOP, PHONE, chromium
from tests.page_server import ANSWERS, PageServer, start

pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting'"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]

EARLY = "#early-text"
GRADIO, OURS = "**/assets/index-*.js", "**/js/page.js"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    running = start(tmp_path_factory.mktemp("page"))
    yield running
    running.close()


@contextmanager
def visit(
    browser: Browser, url: str, held: str = "", before: str = "", **context: Any
) -> Iterator[Any]:
    """A fresh visitor; a script that `held` matches comes only when `release` is called. `before`
    runs first of all in the page."""
    with browser.new_context(**{"viewport": DESKTOP, "locale": "en-US", **context}) as own:
        page = own.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        waiting: list[Route] = []
        page.add_init_script(before)
        if held:
            page.route(held, lambda route: waiting.append(route))

        def release() -> None:
            page.route(held, lambda route: route.continue_())
            for route in waiting:
                route.continue_()

        page.goto(url, wait_until="commit")
        page.wait_for_selector(f"{EARLY}, {BOX}")
        yield page, release
        assert errors == []


def answered(page: Page, question: str, answer: str) -> None:
    """One question, one answer, and nothing besides."""
    expect(page.locator(".turn.assistant .words")).to_have_text(answer)
    page.wait_for_selector(BOX)
    expect(page.locator(".turn .bubble")).to_have_text([question])


@pytest.mark.parametrize("script", [GRADIO, OURS], ids=["gradio", "ours"])
def test_a_message_sent_before_a_script_has_come_is_shown_at_once_and_answered(
    browser: Browser, server: PageServer, script: str
) -> None:
    with visit(browser, server.url, script) as (page, release):
        page.fill(EARLY, "hello early")
        page.press(EARLY, "Enter")
        expect(page.locator(".bubble")).to_have_text("hello early")
        expect(page.locator(EARLY)).to_have_value("")
        page.locator(EARLY).press_sequentially("and the next")
        page.press(EARLY, "Enter")  # one is under way: this one waits in the box
        release()
        answered(page, "hello early", ANSWERS["hello"])
        expect(page.locator(BOX)).to_have_value("and the next")
        expect(page.locator(BOX)).to_be_focused()
        page.press(BOX, "Enter")
        expect(page.locator(".turn .bubble")).to_have_text(["hello early", "and the next"])


@pytest.mark.parametrize("pause", [0, 150, 400, 700])
def test_what_is_typed_while_the_boxes_change_places_is_whole_and_sent_once(
    browser: Browser, server: PageServer, pause: int
) -> None:
    with visit(browser, server.url) as (page, _):
        page.wait_for_timeout(pause)
        page.get_by_role("textbox").last.click()
        page.keyboard.type("hello to all of you who are here", delay=25)
        page.keyboard.press("Enter")
        answered(page, "hello to all of you who are here", ANSWERS["hello"])
        expect(page.locator(BOX)).to_have_value("")


def test_the_caret_stays_where_it_was(browser: Browser, server: PageServer) -> None:
    with visit(browser, server.url, GRADIO) as (page, release):
        page.fill(EARLY, "hello world")
        for _ in range(5):
            page.press(EARLY, "ArrowLeft")
        release()
        page.wait_for_selector(BOX)
        page.keyboard.type("big ")
        expect(page.locator(BOX)).to_have_value("hello big world")


def test_a_word_of_an_input_method_is_not_broken_off(browser: Browser, server: PageServer) -> None:
    with visit(browser, server.url, GRADIO, locale="zh-CN") as (page, release):
        expect(page.locator(EARLY)).to_have_attribute("placeholder", "请输入问题…")
        page.focus(EARLY)
        typing = page.context.new_cdp_session(page)
        typing.send(
            "Input.imeSetComposition", {"text": "ni", "selectionStart": 2, "selectionEnd": 2}
        )
        release()
        page.wait_for_selector("#composer textarea", state="attached")
        page.wait_for_timeout(500)
        assert page.locator(EARLY).count() == 1
        typing.send("Input.insertText", {"text": "你好"})
        expect(page.locator(BOX)).to_have_value("你好")


FORBIDDEN = """for (const name of ["localStorage", "sessionStorage", "indexedDB"]) {
    const get = () => { throw new DOMException("Access is denied", "SecurityError"); };
    Object.defineProperty(window, name, { get, configurable: true });
}"""


def test_where_the_browser_forbids_storage_there_is_a_conversation_all_the_same(
    browser: Browser, server: PageServer
) -> None:
    with visit(browser, server.url, before=FORBIDDEN) as (page, _):
        page.wait_for_selector(BOX)
        page.fill(BOX, "hello you")
        page.press(BOX, "Enter")
        answered(page, "hello you", ANSWERS["hello"])
        page.click("#open-sidebar")
        expect(page.locator("#chat-list .open")).to_have_text("hello you")
        expect(page.locator("#chats-note")).to_contain_text("keeps no data")


def test_on_a_phone_the_first_box_has_a_button_to_send(
    browser: Browser, server: PageServer
) -> None:
    phone = {"viewport": PHONE, "has_touch": True, "is_mobile": True}
    with visit(browser, server.url, GRADIO, **phone) as (page, release):
        page.tap(EARLY)
        page.keyboard.type("hello there")
        page.keyboard.press("Enter")
        page.keyboard.type("and here")
        page.tap("#early-send")
        expect(page.locator(".bubble")).to_have_text("hello there\nand here")
        release()
        answered(page, "hello there\nand here", ANSWERS["hello"])


def test_the_boxes_are_in_the_same_place(browser: Browser, server: PageServer) -> None:
    """Nothing jumps when Gradio's box comes."""
    with visit(browser, server.url, GRADIO) as (page, release):
        page.wait_for_selector('#shell[data-state="ready"]')
        early, send = (page.locator(x).bounding_box() for x in (EARLY, "#early-send"))
        release()
        page.wait_for_selector(BOX)
        box, button = (page.locator(x).bounding_box() for x in (BOX, "#composer .submit-button"))
        assert early and send and box and button
        for was, now in ((early, box), (send, button)):
            assert all(abs(was[side] - now[side]) <= 1 for side in was), (was, now)


def test_the_page_loads_no_video_library_and_no_file_twice(
    browser: Browser, server: PageServer
) -> None:
    with browser.new_context() as context:
        page = context.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(server.url)
        page.wait_for_selector(BOX)
        page.wait_for_timeout(500)
    files = [url for url in asked if "/assets/" in url]
    assert len(files) == len(set(files)) > 40
    assert not [url for url in files if "/hls-" in url]
