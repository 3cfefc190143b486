"""The two pages that bench/page.py compares, each served from a process of its own.

    python bench/page_servers.py ours 7860      to look at one

Both answer from the same script: "count 500" says 500 words at 100 a second, "walk 500" at 50 a
second, "burst 500" at once.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402

RATE, USER_RATE = 100.0, 50.0


def serve_ours(port: int) -> None:
    import tempfile

    from tests import page_server

    page_server.SCENES["count"] = partial(walk, rate=RATE)
    page_server.SCENES["walk"] = partial(walk, rate=USER_RATE)
    page_server.SCENES["burst"] = burst
    server = page_server.start(Path(tempfile.mkdtemp()), port=port)
    print(server.keys.owner_token, flush=True)
    while True:
        time.sleep(60)


def walk(question: str, rate: float) -> Iterator[Any]:
    """On time however late a step was: what is measured is the page, not the script's own clock."""
    from serve.engine.scripted import Say

    due = time.monotonic()
    for i in range(int(question.split()[1])):
        yield Say(tuple(f"word{i % 10} ".encode()))
        due += 1 / rate
        yield max(0.0, due - time.monotonic())


def burst(question: str) -> Iterator[Any]:
    from serve.engine.scripted import Say

    for i in range(int(question.split()[1])):
        yield Say(tuple(f"word{i % 10} ".encode()))


def serve_stock(port: int) -> None:
    import asyncio

    import gradio as gr

    async def answer(message: str, history: list[Any]) -> Any:
        word, _, rest = message.partition(" ")
        count = int(rest) if word in ("count", "walk", "burst") else 5
        text, due = "", time.monotonic()
        for i in range(count):
            text += f"word{i % 10} "
            yield text
            if word != "burst":
                due += 1 / (RATE if word == "count" else USER_RATE)
                await asyncio.sleep(max(0, due - time.monotonic()))

    gr.ChatInterface(answer, title="stock", concurrency_limit=None).launch(
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
        [sys.executable, __file__, kind, str(port)],
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


if __name__ == "__main__":
    {"ours": serve_ours, "stock": serve_stock}[sys.argv[1]](int(sys.argv[2]))
