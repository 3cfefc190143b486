"""Hubs on 127.0.0.1 that behave as networks do: one server with Hugging Face's, ModelScope's and
OpenXLab's addresses over the same folder of files, and a schedule of faults for its downloads.

A fault is taken from `faults` for each request for a file's bytes, oldest first; then all is well.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.local_server import QuietHandler, listening

KINDS = (
    "cut", "503", "html", "loop", "stall", "slow", "ignore-range", "garbage", "longer", "refuse",
    "chunked-cut", "wrong-range",
)  # fmt: skip


@dataclass
class Fault:
    """`at` is where in the file's answer it strikes, as a part of 1."""

    kind: str
    at: float = 0.5


@dataclass
class FakeHub:
    """`files` by repository: {"owner/name": {path: bytes}}."""

    files: dict[str, dict[str, bytes]]
    faults: deque[Fault] = field(default_factory=deque)
    listing_faults: deque[str] = field(default_factory=deque)
    requests: list[tuple[str, str]] = field(default_factory=list)
    stall_seconds: float = 0.6
    slow_seconds: float = 0.01
    wrong_hash_of: frozenset[str] = frozenset()
    base: str = ""
    keys: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_fault(self) -> Fault | None:
        with self.lock:
            return self.faults.popleft() if self.faults else None

    def sha256(self, path: str, content: bytes) -> str:
        told = content + b"!" if path in self.wrong_hash_of else content
        return hashlib.sha256(told).hexdigest()

    def bytes_requests(self) -> list[str]:
        return [path for method, path in self.requests if method == "BYTES"]


def repository_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    class Handler(_Handler):
        fake = hub

    with listening(Handler) as hub.base:
        yield hub


class _Handler(QuietHandler):
    fake: FakeHub

    def do_HEAD(self) -> None:
        self.send_head(200, {"Content-Length": "0"})

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        with self.fake.lock:
            self.fake.requests.append(("GET", self.path))
        try:
            self._route(parts, query)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"{}")
        with self.fake.lock:
            self.fake.requests.append(("POST", self.path))
        self._openxlab(urlsplit(self.path).path, body)

    def _route(self, parts: list[str], query: dict[str, str]) -> None:
        if parts[0] == "loop":
            self.send_head(302, {"Location": self.path, "Content-Length": "0"})
        elif parts[:2] == ["api", "models"]:
            self._list_huggingface("/".join(parts[2:4]))
        elif parts[:3] == ["api", "v1", "models"] and parts[-1] == "files":
            self._list_modelscope("/".join(parts[3:5]))
        elif parts[:3] == ["api", "v1", "models"]:
            self._bytes("/".join(parts[3:5]), query["FilePath"])
        elif parts[0] == "weight":
            self._bytes("/".join(parts[1:3]), "/".join(parts[3:]))
        elif len(parts) > 4 and parts[2] == "resolve":
            self._bytes("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._json(404, {"error": "no such page"})

    # -- listings ----

    def _repository(self, name: str) -> dict[str, bytes] | None:
        fault = self.fake.listing_faults.popleft() if self.fake.listing_faults else None
        if fault == "503":
            self._json(503, {"error": "busy"})
        elif fault == "html":
            self.send(200, b"<html>we are closed</html>", {"Content-Type": "text/html"})
        elif fault == "loop":
            self.send_head(302, {"Location": "/loop/x", "Content-Length": "0"})
        elif fault == "stall":
            time.sleep(self.fake.stall_seconds)
            self.close_connection = True
        elif fault == "json":
            self._json(200, {"Code": 10010205001, "Message": "not today", "Data": None})
        elif name not in self.fake.files:
            self._json(404, {"error": "Repository not found"})
        else:
            return self.fake.files[name]
        return None

    def _list_huggingface(self, name: str) -> None:
        files = self._repository(name)
        if files is None:
            return
        siblings = []
        for path, content in files.items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(content)}
            if path.endswith((".safetensors", ".gguf")):
                digest = self.fake.sha256(path, content)
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            else:
                start = b"blob %d\0" % len(content)
                entry["blobId"] = hashlib.sha1(start + content).hexdigest()
            siblings.append(entry)
        self._json(200, {"id": name, "sha": "a" * 40, "siblings": siblings})

    def _list_modelscope(self, name: str) -> None:
        files = self._repository(name)
        if files is None:
            return
        entries: list[dict[str, Any]] = [
            {
                "Path": path,
                "Name": path.split("/")[-1],
                "Size": len(content),
                "Sha256": self.fake.sha256(path, content),
                "Type": "blob",
            }
            for path, content in files.items()
        ]
        entries.append({"Path": "original", "Name": "original", "Size": 0, "Type": "tree"})
        self._json(200, {"Code": 200, "Data": {"Files": entries}, "Success": True})

    def _openxlab(self, path: str, body: dict[str, Any]) -> None:
        if path.endswith("getFileDownloadUrl"):
            name = f"{body['userName']}/{body['repositoryName']}"
            files = self._repository(name)
            if files is None:
                return
            urls = {
                path: {
                    "url": f"{self.fake.base}/weight/{name}/{path}",
                    "fileName": path,
                    "hash": self.fake.sha256(path, content),
                }
                for path, content in files.items()
            }
            self._openxlab_data({"modelNames": {}, "filePaths": urls})
        elif path.endswith("/open/auth"):
            self._openxlab_data({"nonce": "n", "algorithm": "HmacSHA1"})
        elif path.endswith("/open/getJwt"):
            good = body.get("ak") == self.fake.keys.get("ak")
            self._openxlab_data({"jwt": "j", "sso_uid": "u"}, "10000" if good else "20001")
        else:
            self._openxlab_data({})

    def _openxlab_data(self, data: dict[str, Any], code: str = "10000") -> None:
        inner = {"msgCode": code, "msg": "ok", "traceId": "t", "data": data}
        self._json(200, {"msgCode": "10000", "msg": "ok", "traceId": "t", "data": inner})

    # -- bytes ----

    def _bytes(self, name: str, path: str) -> None:
        content = self.fake.files.get(name, {}).get(path)
        if content is None:
            self._json(404, {"error": "no such file"})
            return
        if self.headers.get("Range") == "bytes=0-0":
            told = {"Content-Range": f"bytes 0-0/{len(content)}", "Content-Length": "1"}
            self.send_head(206, told)
            self.wfile.write(content[:1])
            return
        with self.fake.lock:
            self.fake.requests.append(("BYTES", path))
        fault = self.fake.next_fault()
        start = self._range_start(len(content))
        if fault and self._without_body(fault):
            return
        if start >= len(content) > 0:
            self.send_head(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"})
            return
        if fault and fault.kind == "ignore-range":
            start = 0
        if fault and fault.kind == "wrong-range":
            start = max(start - 1, 0)
        self._send_part(content, start, fault)

    def _range_start(self, size: int) -> int:
        asked = self.headers.get("Range", "")
        return int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0

    def _without_body(self, fault: Fault) -> bool:
        if fault.kind == "503":
            self._json(503, {"error": "busy"})
        elif fault.kind == "html":
            self.send(
                200, b"<html>maintenance</html>", {"Content-Type": "text/html; charset=utf-8"}
            )
        elif fault.kind == "loop":
            self.send_head(302, {"Location": "/loop/x", "Content-Length": "0"})
        elif fault.kind == "refuse":
            self.close_connection = True
        else:
            return False
        return True

    def _send_part(self, content: bytes, start: int, fault: Fault | None) -> None:
        part = content[start:]
        kind = fault.kind if fault else ""
        if kind == "garbage":
            part = bytes(255 - b for b in part)
        declared = len(part)
        if kind == "longer":
            part, declared = part + b"more", declared + 4
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if kind == "chunked-cut":
            headers["Transfer-Encoding"] = "chunked"
        else:
            headers["Content-Length"] = str(declared)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_head(206 if start else 200, headers)
        at = int(len(part) * fault.at) if fault else 0
        if kind == "chunked-cut":
            self.wfile.write(b"%x\r\n" % len(part) + part[:at])
            self.close_connection = True
        elif kind == "cut":
            self.wfile.write(part[:at])
            self.close_connection = True
        elif kind == "stall":
            self.wfile.write(part[:at])
            self.wfile.flush()
            time.sleep(self.fake.stall_seconds)
            self.close_connection = True
        elif kind == "slow":
            for i in range(0, len(part), max(len(part) // 5, 1)):
                self.wfile.write(part[i : i + max(len(part) // 5, 1)])
                self.wfile.flush()
                time.sleep(self.fake.slow_seconds)
        else:
            self.wfile.write(part)

    def _json(self, status: int, body: dict[str, Any]) -> None:
        self.send(status, json.dumps(body).encode(), {"Content-Type": "application/json"})


def schedule(faults: Iterable[tuple[str, float]]) -> deque[Fault]:
    return deque(Fault(kind, at) for kind, at in faults)
