"""What bench/page.py measures in the browser: loading, turns, words, streams, ends.

Each function takes a browser, a page's address and, where both pages are measured, what its box is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from playwright.sync_api import Browser, CDPSession, Page

PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1280, "height": 800}
SLOW_4G = {"offline": False, "latency": 150, "downloadThroughput": 200e3, "uploadThroughput": 94e3}
OURS = "#dock #composer textarea"
OUR_FIRST = f"#early-text, {OURS}"  # what one may type into and send from, from the first paint on
STOCK = "textarea[data-testid=textbox]"
TOKENS = 2000

SHOWN = "/word4/"
LAST = "[...document.querySelectorAll('.turn.assistant .words, .bot.message')].at(-1)?.textContent"
# When the box that takes files stands on the page, by the page's own clock.
WATCH_BOX = """box => new MutationObserver((_, seen) => {
    if (!document.querySelector(box)) return;
    window.boxAt = performance.now();
    seen.disconnect();
}).observe(document, { childList: true, subtree: true })"""


class Visit:
    """One fresh browser profile on one of the pages."""

    def __init__(self, browser: Browser, url: str, box: str, phone: bool = False) -> None:
        self.context = browser.new_context(viewport=PHONE if phone else DESKTOP, locale="en-US")
        self.page: Page = self.context.new_page()
        self.box = box
        self.url = url
        self.cdp: CDPSession = self.context.new_cdp_session(self.page)
        self.cdp.send("Network.enable")
        self.cdp.send("Performance.enable")
        self.bytes_down = 0
        self.requests: list[Any] = []
        self.cdp.on("Network.loadingFinished", self._finished)
        self.page.on("request", lambda request: self.requests.append(request))
        if phone:
            self.cdp.send("Network.emulateNetworkConditions", SLOW_4G)
            self.cdp.send("Emulation.setCPUThrottlingRate", {"rate": 4})
        whole = OURS if box == OUR_FIRST else box
        self.page.add_init_script(f"({WATCH_BOX})({whole!r})")
        self.began = time.monotonic()
        self.page.goto(url, wait_until="commit")

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def _finished(self, event: Any) -> None:
        self.bytes_down += int(event["encodedDataLength"])

    def wait_for_box(self) -> float:
        self.page.wait_for_selector(self.box, timeout=60000)
        return time.monotonic() - self.began

    def first_paint(self) -> float:
        script = "() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"
        for _ in range(100):
            paint: float = self.page.evaluate(script)
            if paint:
                return paint / 1000
            time.sleep(0.05)
        return float("nan")

    def busy(self) -> float:
        """Seconds that the page's main thread has worked since it was opened."""
        metrics = self.cdp.send("Performance.getMetrics")["metrics"]
        return float(next(m["value"] for m in metrics if m["name"] == "TaskDuration"))

    def ask(self, text: str, done: str, seconds: float = 90, look_every: int = 20) -> float:
        """Seconds from Enter until `done` (a regular expression) is in the last answer, which is
        looked at every `look_every` ms (looking costs the page's thread, too)."""
        self.page.fill(self.box, text)
        began = time.monotonic()
        self.page.press(self.box, "Enter")
        self.page.wait_for_function(
            """done => {
                const all = document.querySelectorAll('.turn.assistant .words, .bot.message');
                return new RegExp(done).test(all[all.length - 1]?.textContent ?? '');
            }""",
            arg=done, timeout=seconds * 1000, polling=look_every,
        )  # fmt: skip
        return time.monotonic() - began


def median(measure: Callable[[], float], runs: int) -> float:
    return statistics.median(measure() for _ in range(runs))


def loading(
    browser: Browser, url: str, box: str, whole: str, phone: bool
) -> tuple[float, float, float, float, float, float]:
    """Medians of three cold starts: first paint, a message typed and sent in `box`, its answer
    shown, `whole` (the box with attachments) there (all in seconds), kB down, requests.

    The message is sent as soon as there is a box, once; that its answer comes is what shows that
    the box was usable.
    """
    rows = []
    for _ in range(3):
        with Visit(browser, url, box, phone) as visit:
            visit.wait_for_box()
            visit.page.fill(box, "burst 5")
            visit.page.press(box, "Enter")
            sent = time.monotonic() - visit.began
            visit.page.wait_for_function(f"() => {SHOWN}.test({LAST})", polling=20)
            answered = time.monotonic() - visit.began
            visit.page.wait_for_selector(whole)
            there = float(visit.page.evaluate("() => window.boxAt ?? 0")) / 1000
            visit.page.wait_for_timeout(1500)
            paint, size = visit.first_paint(), visit.bytes_down / 1000
            rows.append((paint, sent, answered, there, size, float(len(visit.requests))))
    return tuple(statistics.median(column) for column in zip(*rows, strict=True))  # type: ignore


def foreign_requests(browser: Browser, url: str, box: str) -> int:
    with Visit(browser, url, box) as visit:
        visit.wait_for_box()
        visit.page.wait_for_timeout(2000)
        own = (url, "data:", "blob:")
        return len([r for r in visit.requests if not r.url.startswith(own)])


def turn_costs(browser: Browser, url: str, box: str) -> tuple[float, float]:
    """Requests and kB uploaded by the 16th turn of a conversation."""
    with Visit(browser, url, box) as visit:
        visit.wait_for_box()
        for i in range(15):
            visit.ask(
                f"a question of some length, number {i}", "word4|You said: .*number " + str(i)
            )
            visit.page.wait_for_timeout(400)
        visit.requests.clear()
        visit.ask("burst 7", "word6 ")
        visit.page.wait_for_timeout(1500)
        sent = sum(len(request.post_data_buffer or b"") for request in visit.requests)
        return len(visit.requests), sent / 1000


def first_token(browser: Browser, url: str, box: str, latency: float) -> float:
    with Visit(browser, url, box) as visit:
        visit.wait_for_box()
        visit.ask("burst 5", "word4")
        visit.page.wait_for_timeout(500)
        conditions = {**SLOW_4G, "latency": latency, "downloadThroughput": -1}
        visit.cdp.send("Network.emulateNetworkConditions", {**conditions, "uploadThroughput": -1})
        return median(lambda: first_word(visit), 5)


def first_word(visit: Visit) -> float:
    """Milliseconds to the first word. The question is new each time, so its answer's end is too."""
    visit.page.evaluate("() => { window.turns = document.querySelectorAll('.words, .bot').length }")
    visit.page.fill(visit.box, "burst 3")
    began = time.monotonic()
    visit.page.press(visit.box, "Enter")
    visit.page.wait_for_function(
        """() => {
            const all = [...document.querySelectorAll('.words, .bot')].slice(window.turns);
            return all.some(n => n.textContent.includes('word'));
        }""",
        polling=5,
    )  # fmt: skip
    seconds = time.monotonic() - began
    visit.page.wait_for_timeout(900)
    return seconds * 1000


def streaming(browser: Browser, url: str, box: str) -> tuple[float, float]:
    """Of 2000 tokens at 100 a second: seconds behind the model at the end, main thread's share."""
    with Visit(browser, url, box) as visit:
        visit.wait_for_box()
        visit.ask("burst 5", "word4")
        visit.page.wait_for_timeout(1000)
        before = visit.busy()
        seconds = visit.ask(f"count {TOKENS}", f"^[^]{{{6 * TOKENS - 3},}}$", look_every=200)
        return seconds, (visit.busy() - before) / seconds


def lag(browser: Browser, url: str) -> float:
    """Milliseconds from the model's last token (by the server's status) to its place on the page,
    after 1000 tokens at 100 a second."""
    with Visit(browser, url, OURS) as visit, ThreadPoolExecutor(1) as beside:
        visit.wait_for_box()
        visit.ask("burst 5", "word4")
        idle = beside.submit(when_idle, url)
        visit.ask("count 1000", "^[^]{5997,}$", look_every=20)
        return max(0.0, time.monotonic() - idle.result()) * 1000


def when_idle(url: str) -> float:
    """The moment when the engine, which is about to be busy, has nothing more to do."""
    with httpx.Client() as client:
        was_busy = False
        while True:
            is_busy = client.get(url + "ui/status").json()["running"] > 0
            if was_busy and not is_busy:
                return time.monotonic()
            was_busy = is_busy
            time.sleep(0.02)


def recovery(browser: Browser, url: str) -> float:
    """Milliseconds, the longest of three failures: from the message that tells of it to the next
    question on the page, with its answer coming."""
    with Visit(browser, url, OURS) as visit:
        visit.wait_for_box()
        found = []
        for scene in ("begin", "middle", "memory"):
            visit.page.fill(OURS, scene)
            visit.page.press(OURS, "Enter")
            visit.page.wait_for_selector(".turn:last-child .error", timeout=20000)
            began = time.monotonic()
            visit.page.fill(OURS, "burst 5")
            visit.page.press(OURS, "Enter")
            visit.page.wait_for_selector(".turn.assistant:last-child .words:has-text('word4')")
            found.append((time.monotonic() - began) * 1000)
        return max(found)


def stop_latency(browser: Browser, url: str) -> float:
    """Milliseconds from Esc to the engine having nothing to do, by the page's own status."""
    with Visit(browser, url, OURS) as visit:
        visit.wait_for_box()
        found = []
        for _ in range(5):
            visit.page.fill(OURS, "hang")
            visit.page.press(OURS, "Enter")
            visit.page.wait_for_selector("#shell.running .turn:last-child .words p")
            began = time.monotonic()
            visit.page.keyboard.press("Escape")
            while httpx.get(url + "ui/status").json()["running"]:
                time.sleep(0.002)
            found.append((time.monotonic() - began) * 1000)
            visit.page.wait_for_timeout(500)
        return statistics.median(found)


def engine_share(browser: Browser, url: str) -> float:
    """Tokens a second of one API stream with a page answering beside it, over without."""

    def api_seconds() -> float:
        key = httpx.get(url + "ui/key", headers={"sec-fetch-site": "same-origin"}).json()["key"]
        body = {"model": "default", "stream": True,
                "messages": [{"role": "user", "content": "count 300"}]}  # fmt: skip
        began = time.monotonic()
        with httpx.stream("POST", url + "v1/chat/completions", json=body, timeout=60,
                          headers={"authorization": f"Bearer {key}"}) as stream:  # fmt: skip
            for _ in stream.iter_lines():
                pass
        return time.monotonic() - began

    alone = api_seconds()
    with Visit(browser, url, OURS) as visit:
        visit.wait_for_box()
        visit.page.fill(OURS, "count 1500")
        visit.page.press(OURS, "Enter")
        visit.page.wait_for_timeout(1000)
        return alone / api_seconds()
