"""A bare git repository with Git LFS objects, served over HTTP on 127.0.0.1: `git http-backend`
for the commits, the LFS batch API for the objects, optionally behind a password, with faults."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.local_server import QuietHandler, listening

BACKEND = "/usr/lib/git-core/git-http-backend"
KINDS = ("cut", "503", "garbage", "html", "loop", "refuse", "slow")


@dataclass
class FakeGit:
    root: Path
    files: dict[str, bytes]
    password: str = ""
    faults: deque[str] = field(default_factory=deque)
    objects: dict[str, bytes] = field(default_factory=dict)
    served: list[str] = field(default_factory=list)
    base: str = ""

    @property
    def url(self) -> str:
        return f"{self.base}/model.git"

    def create(self) -> None:
        """Commit small files as they are and weights as pointers to LFS objects."""
        work = self.root / "work"
        work.mkdir(parents=True)
        for name, content in self.files.items():
            path = work / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._pointer(content) if name.endswith(".safetensors") else content)
        (work / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        plain = ["-c", "filter.lfs.clean=cat", "-c", "filter.lfs.required=false"]
        plain += ["-c", "filter.lfs.process=", "-c", "user.name=t", "-c", "user.email=t@t"]
        for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "model"]):
            subprocess.run(["git", "-C", str(work), *plain, *arguments], check=True)
        bare = str(self.root / "model.git")
        subprocess.run(["git", "clone", "-q", "--bare", str(work), bare], check=True)
        subprocess.run(["git", "-C", bare, "config", "http.uploadpack", "true"], check=True)

    def _pointer(self, content: bytes) -> bytes:
        oid = hashlib.sha256(content).hexdigest()
        self.objects[oid] = content
        head = "version https://git-lfs.github.com/spec/v1"
        return f"{head}\noid sha256:{oid}\nsize {len(content)}\n".encode()


@contextmanager
def serving_git(fake: FakeGit) -> Iterator[FakeGit]:
    fake.create()

    class Handler(_Handler):
        git = fake

    with listening(Handler) as fake.base:
        yield fake


class _Handler(QuietHandler):
    git: FakeGit

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(body)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, body: bytes) -> None:
        if not self._is_allowed():
            self.send(401, b"", {"WWW-Authenticate": 'Basic realm="models"'})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif self.path == "/loop":
            time.sleep(0.01)
            self.send(302, b"", {"Location": "/loop"})
        elif self.path.startswith("/objects/"):
            self._object(self.path.rsplit("/", 1)[-1])
        elif "/info/lfs/" in self.path:
            self.send(404, b"{}", {"Content-Type": "application/vnd.git-lfs+json"})
        else:
            self._backend(body)

    def _is_allowed(self) -> bool:
        if not self.git.password or self.path.startswith("/objects/"):
            return True
        expected = base64.b64encode(f"user:{self.git.password}".encode()).decode()
        return self.headers.get("Authorization") == f"Basic {expected}"

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {
                **entry,
                "actions": {"download": {"href": f"{self.git.base}/objects/{entry['oid']}"}},
            }
            for entry in asked["objects"]
        ]
        body = json.dumps({"transfer": "basic", "objects": objects}).encode()
        self.send(200, body, {"Content-Type": "application/vnd.git-lfs+json"})

    def _object(self, oid: str) -> None:
        content = self.git.objects[oid]
        fault = self.git.faults.popleft() if self.git.faults else ""
        self.git.served.append(oid)
        asked = self.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        if self._without_object(fault):
            return
        part = content[start:]
        if fault == "garbage":
            part = bytes(255 - b for b in part)
        headers = {"Content-Length": str(len(part)), "Content-Type": "application/octet-stream"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_head(206 if start else 200, headers)
        try:
            self.wfile.write(part[: len(part) // 2] if fault == "cut" else part)
        except (BrokenPipeError, ConnectionResetError):
            pass
        self.close_connection = fault == "cut"

    def _without_object(self, fault: str) -> bool:
        if fault == "503":
            self.send(503, b"busy", {})
        elif fault == "html":
            self.send(200, b"<html>maintenance</html>", {"Content-Type": "text/html"})
        elif fault == "loop":
            self.send(302, b"", {"Location": "/loop"})
        elif fault == "refuse":
            self.close_connection = True
        else:
            time.sleep(0.05 if fault == "slow" else 0)
            return False
        return True

    def _backend(self, body: bytes) -> None:
        path, _, query = self.path.partition("?")
        environment = {
            "GIT_PROJECT_ROOT": str(self.git.root),
            "GIT_HTTP_EXPORT_ALL": "1",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers.get("Content-Type", ""),
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
            "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
            "PATH": "/usr/bin:/bin",
        }
        done = subprocess.run([BACKEND], input=body, env=environment, capture_output=True)
        head, _, content = done.stdout.partition(b"\r\n\r\n")
        headers = dict(line.split(": ", 1) for line in head.decode().splitlines() if ": " in line)
        status = int(headers.pop("Status", "200").split()[0])
        self.send(status, content, headers)
