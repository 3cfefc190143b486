"""The page beside a stock gr.ChatInterface, in a real Chromium, in the same run.

    python bench/page.py                     about seven minutes; prints a Markdown table
    python bench/page.py --only loading      a part: loading, turns, words, streams, crowd, ends

Both serve the same scripted model from a process of their own, so what differs is the page. Each
figure is the median of the runs named beside it; ratios are what to compare between machines. The
"phone" is 360 pixels wide with slow 4G (1.6 Mbit/s, 150 ms) and a four times slower processor.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402
from playwright.sync_api import Browser, CDPSession, Page  # noqa: E402

from bench.page_servers import RATE, running  # noqa: E402
from tests.browser import chromium  # noqa: E402

PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1280, "height": 800}
SLOW_4G = {"offline": False, "latency": 150, "downloadThroughput": 200e3, "uploadThroughput": 94e3}
OURS = "#dock #composer textarea"
OUR_FIRST = f"#early-text, {OURS}"  # what one may type into and send from, from the first paint on
STOCK = "textarea[data-testid=textbox]"
TOKENS = 2000
USERS, USER_TOKENS = 32, 200
Reader = Callable[[httpx.AsyncClient, str, int], Awaitable[float]]


# ---- what is measured in the browser ----


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


# ---- what is measured over HTTP ----


def stream_bytes(url: str) -> tuple[float, float]:
    """Bytes down and seconds for each token of one page turn of 500 tokens at 100 a second."""
    client = httpx.Client(base_url=url, timeout=60)
    index = submit_index(client.get("config").json())
    turn = {"answer": "a", "question": "q", "text": "count 500", "options": {}, "history": []}
    body = {"data": [{"text": "", "files": []}, turn, None], "fn_index": index,
            "session_hash": "bench", "trigger_id": None}  # fmt: skip
    client.post("gradio_api/queue/join", json=body).raise_for_status()
    size, began = 0, time.monotonic()
    with client.stream("GET", "gradio_api/queue/data?session_hash=bench") as stream:
        for line in stream.iter_lines():
            size += len(line) + 2
            if "process_completed" in line:
                break
    return size / 500, time.monotonic() - began


def slowdown(url: str, reader: Reader) -> float:
    """How much longer 200 tokens at 50 a second take one of 32 readers (the median) than one
    alone."""
    with ThreadPoolExecutor(1) as aside:  # this thread's loop is the browser driver's
        many, one = (aside.submit(asyncio.run, crowd(url, reader, n)).result() for n in (USERS, 1))
    return many / one


async def crowd(url: str, reader: Reader, users: int) -> float:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        index = submit_index((await client.get("config")).json())
        runs = (reader(client, f"user{n}of{users}", index) for n in range(users))
        return statistics.median(await asyncio.gather(*runs))


def submit_index(config: Any) -> int:
    """The number of the event that a message in the box starts."""
    dependencies = config["dependencies"]
    return int(next(d["id"] for d in dependencies if any(t[1] == "submit" for t in d["targets"])))


async def our_reader(client: httpx.AsyncClient, name: str, index: int) -> float:
    """Seconds for one turn, asked as the page asks."""
    text = f"walk {USER_TOKENS}"
    turn = {"answer": "a", "question": "q", "text": text, "options": {}, "history": []}
    body = {"data": [{"text": "", "files": []}, turn, None], "fn_index": index,
            "session_hash": name, "trigger_id": None}  # fmt: skip
    began = time.monotonic()
    (await client.post("gradio_api/queue/join", json=body)).raise_for_status()
    await until(client, f"gradio_api/queue/data?session_hash={name}", "process_completed")
    return time.monotonic() - began


async def stock_reader(client: httpx.AsyncClient, name: str, _index: int) -> float:
    """Seconds for one call of the stock page's public endpoint."""
    began = time.monotonic()
    body = {"data": [f"walk {USER_TOKENS}"], "session_hash": name}
    asked = await client.post("gradio_api/call/answer", json=body)
    asked.raise_for_status()
    await until(client, f"gradio_api/call/answer/{asked.json()['event_id']}", "event: complete")
    return time.monotonic() - began


async def until(client: httpx.AsyncClient, path: str, end: str) -> None:
    last = ""
    async with client.stream("GET", path) as stream:
        async for line in stream.aiter_lines():
            if end in line and '"success":false' not in line:
                return
            last = line or last
    raise RuntimeError(f"No {end!r}; the last line was {last[:200]}")


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


# ---- the table ----

Row = tuple[str, str, str, str]


def loading_rows(browser: Browser, ours: str, stock: str) -> Iterator[Row]:
    for phone, name in ((False, "desk"), (True, "phone")):
        a = loading(browser, ours, OUR_FIRST, OURS, phone)
        b = loading(browser, stock, STOCK, STOCK, phone)
        targets = ("≤ 1.0 s", "≤ 5.5 s") if phone else ("≤ 0.5 s", "≤ 2.0 s")
        words = ("first contentful paint", "typed and sent", "its answer shown", "box for files")
        for i, word in enumerate(words):
            target = targets[0] if i == 0 else targets[1] if i == 1 else ""
            yield f"{word}, {name}", f"{b[i]:.2f} s", f"{a[i]:.2f} s", target
        if not phone:
            yield "page weight", f"{b[4]:.0f} kB", f"{a[4]:.0f} kB", "≤ 620 kB"
            yield "requests to load", f"{b[5]:.0f}", f"{a[5]:.0f}", ""


def turn_rows(browser: Browser, ours: str, stock: str) -> Iterator[Row]:
    strangers = [str(foreign_requests(browser, u, x)) for u, x in ((stock, STOCK), (ours, OURS))]
    yield ("third-party requests", *strangers, "0")  # type: ignore[misc]
    a, b = turn_costs(browser, ours, OURS), turn_costs(browser, stock, STOCK)
    yield "requests a turn", f"{b[0]:.0f}", f"{a[0]:.0f}", "≤ 3"
    yield "upload a turn at 15 turns", f"{b[1]:.1f} kB", f"{a[1]:.1f} kB", "≤ 2 kB"


def word_rows(browser: Browser, ours: str, stock: str) -> Iterator[Row]:
    for latency in (0, 150):
        a = first_token(browser, ours, OURS, latency)
        b = first_token(browser, stock, STOCK, latency)
        yield f"Enter to first word, +{latency} ms", f"{b:.0f} ms", f"{a:.0f} ms", ""


def stream_rows(browser: Browser, ours: str, stock: str) -> Iterator[Row]:
    a, b = streaming(browser, ours, OURS), streaming(browser, stock, STOCK)
    ideal = f"{TOKENS / RATE:.0f} s"
    yield "2000 tokens at 100/s: done after", f"{b[0]:.1f} s", f"{a[0]:.1f} s", ideal
    yield "main thread while streaming", f"{b[1]:.0%}", f"{a[1]:.0%}", "≤ 25 %"


def crowd_rows(browser: Browser, ours: str, stock: str) -> Iterator[Row]:
    a, b = slowdown(ours, our_reader), slowdown(stock, stock_reader)
    yield "32 readers at 50/s: slower than one by", f"{b:.2f} ×", f"{a:.2f} ×", "≤ 1.15 ×"
    yield "bytes down for a token at 100/s", "–", f"{stream_bytes(ours)[0]:.0f}", "≤ 80"
    yield "API stream beside a page ÷ alone", "–", f"{engine_share(browser, ours):.3f}", "≥ 0.98"


def end_rows(browser: Browser, ours: str, stock: str) -> Iterator[Row]:
    yield "page behind the model at the end", "–", f"{lag(browser, ours):.0f} ms", "≤ 300 ms"
    yield "Esc to the engine idle", "no Esc", f"{stop_latency(browser, ours):.0f} ms", "≤ 200 ms"
    again = f"{recovery(browser, ours):.0f} ms"
    yield "failure told to the next answer", "–", again, "≤ 1000 ms"


PARTS: dict[str, Callable[[Browser, str, str], Iterator[Row]]] = {
    "loading": loading_rows,
    "turns": turn_rows,
    "words": word_rows,
    "streams": stream_rows,
    "crowd": crowd_rows,
    "ends": end_rows,
}


def table(browser: Browser, parts: Sequence[str]) -> Iterator[Row]:
    """(what, stock, ours, target), as they are found."""
    with running("ours") as (ours, _), running("stock") as (stock, _):
        for part in parts:
            yield from PARTS[part](browser, ours, stock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    chosen = parser.parse_args()
    print("| measured | stock gr.ChatInterface | this page | target |\n|---|---|---|---|")
    with chromium() as browser:
        for row in table(browser, chosen.only):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
