"""From process start to the first token: seconds to the page, to ready, to the first token; memory.

Starts `python app.py` on a free port of 127.0.0.1 with the environment it is given (no setting:
the embedded model; run it once before, so that the download is apart) and prints one line a figure
beside the limit that the project sets itself. Usage: .venv/bin/python bench/first_answer.py
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

ROOT = Path(__file__).parent.parent
KEY = "bench-key-not-secret"
LIMIT_SECONDS = 900


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(client: httpx.Client, path: str, started: float, want: int = 200) -> float:
    while time.monotonic() - started < LIMIT_SECONDS:
        try:
            if client.get(path).status_code == want:
                return time.monotonic() - started
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise SystemExit(f"{path} did not answer {want} within {LIMIT_SECONDS} s")


def first_token(client: httpx.Client, started: float) -> float:
    body = {
        "model": "default",
        "stream": True,
        "max_tokens": 8,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    }
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            if '"content":"' in line.replace(" ", "") and '"content":""' not in line.replace(
                " ", ""
            ):
                return time.monotonic() - started
    raise SystemExit("the stream ended without a token")


def main() -> None:
    port = free_port()
    environment = {**os.environ, "HOST": "127.0.0.1", "PORT": str(port), "APP_API_KEY": KEY}
    started = time.monotonic()
    app = subprocess.Popen([sys.executable, str(ROOT / "app.py")], env=environment, cwd=ROOT)
    try:
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60
        ) as client:
            page = wait(client, "/", started)
            ready = wait(client, "/ready", started)
            token = first_token(client, started)
        memory = psutil.Process(app.pid).memory_info().rss / 2**20
    finally:
        app.send_signal(signal.SIGTERM)
        app.wait(30)
    print(f"{'page':24}{page:8.1f} s   (limit 10)")
    print(f"{'ready':24}{ready:8.1f} s   (limit 60)")
    print(f"{'first token':24}{token:8.1f} s   (limit 60)")
    print(f"{'resident memory':24}{memory:8.0f} MiB")


if __name__ == "__main__":
    main()
