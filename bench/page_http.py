"""What bench/page.py measures over HTTP, without a browser: 32 readers, bytes for a token."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

USERS, USER_TOKENS = 32, 200
Reader = Callable[[httpx.AsyncClient, str, int], Awaitable[float]]


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
