"""A Python package registry with one wheel in it, as slow as a test wants it."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tests.local_server import QuietHandler, listening


def wheel_of(name: str, version: str, files: Mapping[str, bytes]) -> bytes:
    """A wheel that holds `files` by path, and an empty package of its name if it holds none."""
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    tags = "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    held = dict(files) or {f"{name}/__init__.py": b""}
    held[f"{name}-{version}.dist-info/METADATA"] = about.encode()
    held[f"{name}-{version}.dist-info/WHEEL"] = tags.encode()
    record = "".join(f"{path},,\n" for path in held)
    held[f"{name}-{version}.dist-info/RECORD"] = record.encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path, content in held.items():
            archive.writestr(path, content)
    return packed.getvalue()


@contextmanager
def registry_with(
    name: str,
    version: str,
    files: Mapping[str, bytes] | None = None,
    *,
    seconds: float = 0.0,
    pieces: int = 1,
    pause: float = 0.0,
) -> Iterator[str]:
    """The index's address. It waits `seconds` before its first answer to each question, and sends
    the wheel in `pieces` with a `pause` after each."""
    wheel = wheel_of(name, version, files or {})
    file = f"{name}-{version}-py3-none-any.whl"

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            if self.path.endswith(file):
                self.send_head(
                    200,
                    {"Content-Length": str(len(wheel)), "Content-Type": "application/octet-stream"},
                )
                step = -(-len(wheel) // pieces)
                for start in range(0, len(wheel), step):
                    self.wfile.write(wheel[start : start + step])
                    time.sleep(pause)
            elif self.path.strip("/") == f"simple/{name.replace('_', '-')}":
                time.sleep(seconds)
                page = f'<!DOCTYPE html><html><body><a href="/{file}">{file}</a></body></html>'
                try:
                    self.send(200, page.encode(), {"Content-Type": "text/html"})
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
            else:
                self.send(404, b"", {})

    with listening(Handler) as base:
        yield f"{base}/simple"
