"""The page beside a stock gr.ChatInterface, in a real Chromium, in the same run.

    python bench/page.py            about five minutes; prints a Markdown table

Both serve the same scripted model from a process of their own, so what differs is the page. Each
figure is the median of the runs named beside it; ratios are what to compare between machines. The
"phone" is 360 pixels wide with slow 4G (1.6 Mbit/s, 150 ms) and a four times slower processor.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402
from playwright.sync_api import Browser, CDPSession, Page  # noqa: E402

from tests.browser import chromium  # noqa: E402

PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1280, "height": 800}
SLOW_4G = {"offline": False, "latency": 150, "downloadThroughput": 200e3, "uploadThroughput": 94e3}
OURS = "#dock #composer textarea"
STOCK = "textarea[data-testid=textbox]"
TOKENS, RATE = 2000, 100.0


# ---- the two servers (each in a process of its own) ----


def serve_ours(port: int) -> None:
    import tempfile

    from tests import page_server

    page_server.SCENES["count"] = count_tokens
    page_server.SCENES["burst"] = burst
    server = page_server.start(Path(tempfile.mkdtemp()), port=port)
    print(server.keys.owner_token, flush=True)
    while True:
        time.sleep(60)


def count_tokens(question: str) -> Iterator[Any]:
    from serve.engine.scripted import Say

    for i in range(int(question.split()[1])):
        yield Say(tuple(f"word{i % 10} ".encode()))
        yield 1 / RATE


def burst(question: str) -> Iterator[Any]:
    from serve.engine.scripted import Say

    for i in range(int(question.split()[1])):
        yield Say(tuple(f"word{i % 10} ".encode()))


def serve_stock(port: int) -> None:
    import asyncio

    import gradio as gr

    async def answer(message: str, history: list[Any]) -> Any:
        word, _, rest = message.partition(" ")
        count = int(rest) if word in ("count", "burst") else 5
        text, due = "", time.monotonic()
        for i in range(count):
            text += f"word{i % 10} "
            yield text
            if word == "count":
                due += 1 / RATE
                await asyncio.sleep(max(0, due - time.monotonic()))

    gr.ChatInterface(answer, title="stock").launch(
        server_name="127.0.0.1", server_port=port, ssr_mode=False, quiet=True
    )


@contextmanager
def running(kind: str) -> Iterator[tuple[str, str]]:
    """The server's address and the first line it printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"}
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", kind, "--port", str(port)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            try:
                httpx.get(url, timeout=5)
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        yield url, (process.stdout.readline().strip() if kind == "ours" and process.stdout else "")
    finally:
        process.terminate()
        process.wait(10)


# ---- what is measured in the browser ----


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


def loading(browser: Browser, url: str, box: str, phone: bool) -> tuple[float, float, float, float]:
    """First paint, box usable (seconds), kB down, requests; medians of three cold starts."""
    rows = []
    for _ in range(3):
        with Visit(browser, url, box, phone) as visit:
            usable = visit.wait_for_box()
            visit.page.wait_for_timeout(1500)
            rows.append((visit.first_paint(), usable, visit.bytes_down / 1000, len(visit.requests)))
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
    config = client.get("config").json()
    index = next(
        d["id"] for d in config["dependencies"] if any(t[1] == "submit" for t in d["targets"])
    )
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


def table(browser: Browser) -> Iterator[tuple[str, str, str, str]]:
    """(what, stock, ours, target), as they are found."""
    with running("ours") as (ours, _), running("stock") as (stock, _):
        a, b = loading(browser, ours, OURS, False), loading(browser, stock, STOCK, False)
        yield from [
            ("first contentful paint, desk", f"{b[0]:.2f} s", f"{a[0]:.2f} s", "≤ 0.5 s"),
            ("box usable, desk", f"{b[1]:.2f} s", f"{a[1]:.2f} s", "≤ 2.0 s"),
            ("page weight", f"{b[2]:.0f} kB", f"{a[2]:.0f} kB", "≤ 620 kB"),
            ("requests to load", f"{b[3]:.0f}", f"{a[3]:.0f}", ""),
        ]
        a, b = loading(browser, ours, OURS, True), loading(browser, stock, STOCK, True)
        yield from [
            ("first contentful paint, phone", f"{b[0]:.2f} s", f"{a[0]:.2f} s", "≤ 1.0 s"),
            ("box usable, phone", f"{b[1]:.2f} s", f"{a[1]:.2f} s", "≤ 5.5 s"),
        ]
        say("loaded")
        strangers = [
            str(foreign_requests(browser, u, x)) for u, x in ((stock, STOCK), (ours, OURS))
        ]
        yield ("third-party requests", *strangers, "0")
        c, d = turn_costs(browser, ours, OURS), turn_costs(browser, stock, STOCK)
        yield from [
            ("requests a turn", f"{d[0]:.0f}", f"{c[0]:.0f}", "≤ 3"),
            ("upload a turn at 15 turns", f"{d[1]:.1f} kB", f"{c[1]:.1f} kB", "≤ 2 kB"),
        ]
        say("turns")
        for latency in (0, 150):
            e = first_token(browser, ours, OURS, latency)
            f = first_token(browser, stock, STOCK, latency)
            yield (f"Enter to first word, +{latency} ms", f"{f:.0f} ms", f"{e:.0f} ms", "")
        say("first words")
        g, h = streaming(browser, ours, OURS), streaming(browser, stock, STOCK)
        ideal = TOKENS / RATE
        yield from [
            (
                "2000 tokens at 100/s: done after",
                f"{h[0]:.1f} s",
                f"{g[0]:.1f} s",
                f"{ideal:.0f} s",
            ),
            ("main thread while streaming", f"{h[1]:.0%}", f"{g[1]:.0%}", "≤ 25 %"),
        ]
        say("streams")
        down, _ = stream_bytes(ours)
        yield from [
            ("bytes down for a token at 100/s", "–", f"{down:.0f}", "≤ 80"),
            (
                "Esc to the engine idle",
                "no Esc",
                f"{stop_latency(browser, ours):.0f} ms",
                "≤ 200 ms",
            ),
            (
                "API stream beside a page ÷ alone",
                "–",
                f"{engine_share(browser, ours):.3f}",
                "≥ 0.98",
            ),
        ]


def say(what: str) -> None:
    print(f"… {what}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", choices=["ours", "stock"])
    parser.add_argument("--port", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.serve:
        (serve_ours if chosen.serve == "ours" else serve_stock)(chosen.port)
        return
    print("| measured | stock gr.ChatInterface | this page | target |\n|---|---|---|---|")
    with chromium() as browser:
        for row in table(browser):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
