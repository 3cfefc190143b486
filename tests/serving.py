"""The API on a plain FastAPI app under uvicorn, in a thread, on a free port of this machine."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI

from openai_compat import create_api
from serve.keys import KeyRing
from serve.service import Service
from serve.settings import Settings

OWNER = "sk-test-owner-key"


@dataclass(frozen=True)
class Served:
    base: str
    keys: KeyRing
    server: uvicorn.Server
    app: FastAPI

    def client(self, key: str | None = OWNER, **options: object) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.base, headers=headers, timeout=20, **options)  # type: ignore[arg-type]


def settings_in(folder: Path, **changes: object) -> Settings:
    return Settings(**{"work_dir": folder, "app_api_key": OWNER, **changes})  # type: ignore[arg-type]


@contextlib.contextmanager
def serving(service: Service, settings: Settings) -> Iterator[Served]:
    keys = KeyRing.from_settings(settings)
    app = FastAPI(**create_api(service, keys, settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(
        app, "127.0.0.1", port, log_level="warning", timeout_graceful_shutdown=1, lifespan="off"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    limit = time.monotonic() + 10
    while not server.started and time.monotonic() < limit:
        time.sleep(0.01)
    try:
        yield Served(f"http://127.0.0.1:{port}", keys, server, app)
    finally:
        server.should_exit = True
        thread.join(10)
