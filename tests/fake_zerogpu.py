"""ZeroGPU's device service on 127.0.0.1, as far as the `spaces` package asks it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.local_server import QuietHandler, listening

TOKEN = "e30.eyJ1c2VyIjogInUifQ.c2ln"  # a visitor's, as Hugging Face's proxy sends it


@dataclass
class Scheduler:
    """`refusal` is (status, headers, JSON) for whoever asks for a GPU."""

    calls: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    refusal: tuple[int, dict[str, str], Any] | None = None
    url: str = ""

    def asked(self, path: str) -> list[dict[str, str]]:
        return [query for called, query in self.calls if called == path]

    def answer(self, path: str) -> tuple[int, dict[str, str], Any]:
        if path != "/schedule":
            return 200, {}, {}
        if self.refusal is not None:
            return self.refusal
        number = len(self.asked("/schedule"))
        lent = {"nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": f"allow-{number}"}
        return 200, {}, {"idle": number > 1, **lent}


@contextmanager
def scheduling() -> Iterator[Scheduler]:
    service = Scheduler()

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            service.calls.append((url.path, query))
            status, headers, body = service.answer(url.path)
            kind = {"Content-Type": "application/json"}
            self.send(status, json.dumps(body).encode(), {**kind, **headers})

    with listening(Handler) as service.url:
        yield service
