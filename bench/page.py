"""The page beside a stock gr.ChatInterface, in a real Chromium, in the same run.

    python bench/page.py                     about seven minutes; prints a Markdown table
    python bench/page.py --only loading      a part: loading, turns, words, streams, crowd, ends

Both serve the same scripted model from a process of their own, so what differs is the page. Each
figure is the median of the runs named beside it; ratios are what to compare between machines. The
"phone" is 360 pixels wide with slow 4G (1.6 Mbit/s, 150 ms) and a four times slower processor.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from playwright.sync_api import Browser  # noqa: E402

from bench.page_browser import (  # noqa: E402
    OUR_FIRST,
    OURS,
    STOCK,
    TOKENS,
    engine_share,
    first_token,
    foreign_requests,
    lag,
    loading,
    recovery,
    stop_latency,
    streaming,
    turn_costs,
)
from bench.page_http import our_reader, slowdown, stock_reader, stream_bytes  # noqa: E402
from bench.page_servers import RATE, running  # noqa: E402
from tests.browser import chromium  # noqa: E402

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
