"""Driving the page in Chromium: what a reader does, and what they see."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Browser, Page, expect, sync_playwright

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 360, "height": 740}
expect.set_options(timeout=20000)  # a busy machine is slow, not wrong
BOX = "#dock #composer textarea"
# A turn that has just been put there shows its text with the next frame (content-visibility).
DRAWN = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
FORGET = """async () => {
  const { store, settings, composer } = window.chatPage.parts;
  for (const conversation of await store.list()) await store.remove(conversation.id);
  settings.reset();
  composer.sent(true);
  document.querySelector("#effort-choice").value = "";
}"""


def chromium_path() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=ARGUMENTS)
        yield browser
        browser.close()


class Reader:
    """Somebody with the page open."""

    def __init__(self, browser: Browser, url: str, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": DESKTOP, "locale": "en-US", **context})
        self.page: Page = self.context.new_page()
        self.errors: list[str] = []
        self.requests: list[Any] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request))
        self.url = url
        self.page.goto(url)

    def __enter__(self) -> Reader:
        self.wait_for_box()
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def wait_for_box(self) -> None:
        self.page.wait_for_selector(BOX, timeout=60000)

    def reload(self) -> None:
        self.page.reload()
        self.wait_for_box()

    def begin_again(self) -> None:
        """As a reader who comes for the first time, without loading the page once more: no
        conversations, no settings, no draft, a closed sidebar, a desktop's window."""
        if self.page.locator("#shell.running").count():
            self.page.keyboard.press("Escape")
            self.wait_for_end()
        self.page.set_viewport_size(DESKTOP)
        if self.page.locator("#sidebar").is_visible():
            self.page.click("#close-sidebar")
        self.page.evaluate(FORGET)
        self.page.click("#new-chat")
        expect(self.page.locator(".turn")).to_have_count(0)
        expect(self.page.locator(BOX)).to_have_value("")
        expect(self.page.locator("#composer .thumbnails")).to_have_count(0)
        self.requests.clear()

    def send(self, text: str) -> None:
        self.page.fill(BOX, text)
        self.page.press(BOX, "Enter")

    def ask(self, text: str) -> str:
        """Send, wait for the end, and return the answer as it is shown."""
        count = self.page.locator(".turn").count()
        self.send(text)
        expect(self.page.locator(".turn")).to_have_count(count + 2)
        self.wait_for_end()
        return self.answer()

    def wait_for_end(self, seconds: float = 60) -> None:
        self.page.wait_for_selector(
            "#shell:not(.running) .turn.assistant:last-child:not([data-state=running])",
            timeout=seconds * 1000,
        )

    def answer(self) -> str:
        self.page.evaluate(DRAWN)
        return self.page.locator(".turn.assistant").last.locator(".words").inner_text()

    @property
    def last(self) -> Any:
        return self.page.locator(".turn.assistant").last

    def stored(self) -> list[dict[str, Any]]:
        """The conversations in the browser's database."""
        found: list[dict[str, Any]] = self.page.evaluate("() => window.chatPage.parts.store.list()")
        return found

    def copied(self) -> str:
        text: str = self.page.evaluate("() => navigator.clipboard.readText()")
        return text
