"""The page's first half second, and what its script asks of the server besides Gradio.

An ASGI wrapper. It puts our markup, style and script into Gradio's HTML, so that the page is drawn
and the conversation is readable before Gradio's own script has loaded; it serves assets/ under
/ui/assets/ and the state of the model under /ui/status. Nothing here is secret or needs a key.
Knows no chat. app.py installs it as middleware.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import html
import json
import mimetypes
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from serve.service import Service
from serve.ui import gradio_files
from serve.ui.bundle import bundle
from serve.values import Status

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

ASSET_ROOT = "/ui/assets/"
STATUS_PATH = "/ui/status"
BUNDLE = "js/page.js"  # js/main.js and all that it imports
EMPTY = "js/empty.js"  # in place of Gradio's library for streamed video
HEADERS = ((b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"same-origin"))


class FirstPaint:
    """`assets` holds shell.html, page.css, js/; read once, when the first page is asked."""

    def __init__(self, app: ASGIApp, service: Service, assets: Path, title: str) -> None:
        self._app = app
        self._service = service
        self._assets = assets
        self._title = title
        self._gradio = gradio_files.folder()
        self._boot = secrets.token_hex(8)  # another process: the page must start afresh
        self._files: dict[str, tuple[bytes, str]] = {}
        self._digest = ""
        self._insert: tuple[str, str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = _path(scope) if scope["type"] == "http" else ""
        if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
            await self._app(scope, receive, send)
        elif path == STATUS_PATH:
            told = {"boot": self._boot, **status_json(self._service.status())}
            body = json.dumps(told).encode()
            await _reply(scope, send, 200, body, "application/json", b"no-store")
        elif path.startswith(ASSET_ROOT):
            await self._asset(scope, send, path.removeprefix(ASSET_ROOT))
        elif path == "/":
            complete = partial(self._complete, address=_address(scope))
            await self._app(scope, receive, _Page(send, complete, _takes_gzip(scope)))
        else:
            await self._app(scope, receive, send)

    # -- files -------------------------------------------------------------------------------------

    async def _asset(self, scope: Scope, send: Send, name: str) -> None:
        # Under the scripts' version a file never changes; under its plain name, ask each time.
        version, _, rest = name.partition("/")
        is_versioned = version == self._version()
        name = rest if is_versioned else name
        found = await asyncio.to_thread(self._read, name)
        if found is None:
            await _reply(scope, send, 404, b"not found", "text/plain", b"no-store")
            return
        body, media_type = found
        tag = f'"{hashlib.sha256(body).hexdigest()[:20]}"'.encode()
        sent = dict(scope["headers"])
        if sent.get(b"if-none-match") == tag:
            await _reply(scope, send, 304, b"", media_type, b"no-cache", tag)
            return
        keep = b"public, max-age=31536000, immutable" if is_versioned else b"no-cache"
        await _reply(scope, send, 200, body, media_type, keep, tag)

    def _read(self, name: str) -> tuple[bytes, str] | None:
        """A file under assets/, kept in memory. Names that leave the folder are not found."""
        if name == BUNDLE and name not in self._files:
            self._files[name] = (bundle(self._assets / "js").encode(), "text/javascript")
        if name == EMPTY and (streaming := gradio_files.streaming(self._gradio)):
            self._files[name] = (streaming[1].encode(), "text/javascript")
        if name not in self._files:
            file = (self._assets / name).resolve()
            if not file.is_relative_to(self._assets.resolve()) or not file.is_file():
                return None
            media_type = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
            if file.suffix == ".js":
                media_type = "text/javascript"
            self._files[name] = (file.read_bytes(), media_type)
        return self._files[name]

    # -- the page ----------------------------------------------------------------------------------

    def _complete(self, page: str, address: str) -> str:
        """Gradio's HTML with our head and our shell in it, for who reads it under `address`."""
        if self._insert is None:
            # Behind the markup it draws in, and not in line behind Gradio's script.
            script = f'<script type="module" async src=".{self._root()}{BUNDLE}"></script>'
            self._insert = (self._head(), (self._assets / "shell.html").read_text() + script)
        head, shell = self._insert
        page = _styles_later(_without_foreign_tags(page))
        page = page.replace("<head>", "<head>" + self._import_map(), 1)
        picture = f'<meta property="og:image" content="{address}ui/assets/social.png">'
        page = page.replace("</head>", picture + head + "</head>", 1)
        return page.replace("<gradio-app", shell + "\n<gradio-app", 1)

    def _head(self) -> str:
        root = self._root()
        early = f'<link rel="modulepreload" href=".{root}{BUNDLE}">'
        early += "".join(_preload(name) for name in gradio_files.chain(self._gradio))
        early += f'<link rel="modulepreload" href=".{root}vendor/marked.esm.js">'
        title = html.escape(self._title)
        return (
            f"<title>{title}</title>"
            f'<meta name="description" content="{title}: chat and an OpenAI-compatible API">'
            f'<meta property="og:title" content="{title}">'
            '<meta name="color-scheme" content="light dark">'
            '<link rel="icon" type="image/svg+xml" href="./ui/assets/favicon.svg">'
            f"<style>{(self._assets / 'page.css').read_text()}</style>"
            f"<script>{(self._assets / 'early.js').read_text()}</script>"
            f"{early}"
        )

    def _import_map(self) -> str:
        """An empty module in place of a large one that no chat needs; before any script."""
        streaming = gradio_files.streaming(self._gradio)
        if streaming is None:
            return ""
        library = f"./assets/{streaming[0]}"
        instead = {library: f".{self._root()}{EMPTY}"}
        # Gradio's script fetches ahead what no link names; this one names it and fetches nothing.
        return (
            f'<script type="importmap">{json.dumps({"imports": instead})}</script>'
            f'<link rel="alternate" href="{library}">'
        )

    def _root(self) -> str:
        return f"{ASSET_ROOT}{self._version()}/"

    def _version(self) -> str:
        """Changes whenever a script does, ours or another's."""
        if not self._digest:
            digest = hashlib.sha256()
            for folder in ("js", "vendor"):
                for path in sorted((self._assets / folder).rglob("*")):
                    digest.update(path.read_bytes() if path.is_file() else b"")
            self._digest = digest.hexdigest()[:12]
        return self._digest


def status_json(status: Status) -> dict[str, Any]:
    """What anybody may know: which model serves, how far its loading is, and why not another."""
    return {
        "ready": status.is_ready,
        "progress": asdict(status.progress),
        "model": None if status.model is None else asdict(status.model),
        "requested": status.requested,
        "offered": list(status.offered),
        "seeing": list(status.seeing),
        "wanted": status.wanted,
        "passed_over": [asdict(candidate) for candidate in status.passed_over],
        "running": status.running,
        "waiting": status.waiting,
    }


class _Page:
    """A send that collects an HTML answer and passes it on completed and packed; anything else
    unchanged."""

    def __init__(self, send: Send, complete: Callable[[str], str], packs: bool) -> None:
        self._send = send
        self._complete = complete
        self._packs = packs
        self._start: MutableMapping[str, Any] | None = None
        self._body: list[bytes] = []

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            if message["status"] == 200 and kind.startswith(b"text/html"):
                self._start = message
                return
        if self._start is None or message["type"] != "http.response.body":
            await self._send(message)
            return
        self._body.append(message.get("body", b""))
        if not message.get("more_body"):
            await self._finish(self._start)

    async def _finish(self, start: MutableMapping[str, Any]) -> None:
        whole = b"".join(self._body)
        body = self._complete(whole.decode()).encode() if whole else whole
        kept = [pair for pair in start["headers"] if pair[0] != b"content-length"]
        packing = [(b"vary", b"accept-encoding")]
        if self._packs and body:
            body = gzip.compress(body, 6)
            packing.append((b"content-encoding", b"gzip"))
        length = [(b"content-length", str(len(body)).encode())] if whole else []
        await self._send({**start, "headers": [*kept, *length, *packing, *HEADERS]})
        await self._send({"type": "http.response.body", "body": body})


def _preload(name: str) -> str:
    """A file of Gradio's, asked for as its own script will ask."""
    if name.endswith(".css"):
        return f'<link rel="preload" as="style" crossorigin href="./assets/{name}">'
    return f'<link rel="modulepreload" crossorigin href="./assets/{name}">'


def _takes_gzip(scope: Scope) -> bool:
    return b"gzip" in dict(scope["headers"]).get(b"accept-encoding", b"")


def _path(scope: Scope) -> str:
    path, root = str(scope["path"]), str(scope.get("root_path") or "")
    return path.removeprefix(root) or "/" if root else path


def _address(scope: Scope) -> str:
    """The page's own, as its reader knows it: who draws a link's preview wants it whole."""
    sent = {name: value.decode("latin-1") for name, value in scope["headers"]}
    host = sent.get(b"x-forwarded-host") or sent.get(b"host", "")
    scheme = sent.get(b"x-forwarded-proto") or str(scope.get("scheme", "http"))
    root = str(scope.get("root_path") or "")
    return html.escape(f"{scheme}://{host}{root}/") if host else "./"


def _without_foreign_tags(page: str) -> str:
    """Drop the titles, addresses and pictures that Gradio gives itself for link previews."""
    foreign = (
        r'(?:property|name)="(?:og|twitter):(?:title|url|image|creator|card|description|type)"'
    )
    return re.sub(rf"<meta\s+{foreign}[^>]*>", "", page)


def _styles_later(page: str) -> str:
    """Gradio's style sheet is for its own box; our first paint need not wait for it."""
    later = """<link rel="stylesheet" media="print" onload="this.media='all'\""""
    return page.replace('<link rel="stylesheet"', later)


async def _reply(
    scope: Scope,
    send: Send,
    status: int,
    body: bytes,
    media_type: str,
    cache: bytes,
    tag: bytes = b"",
) -> None:
    headers = [
        (b"content-type", f"{media_type}; charset=utf-8".encode()),
        (b"cache-control", cache),
        *HEADERS,
    ]
    if tag:
        headers.append((b"etag", tag))
    if len(body) > 1000 and _takes_gzip(scope) and not media_type.startswith(("image/p", "font/")):
        body = gzip.compress(body, 6)
        headers += [(b"content-encoding", b"gzip"), (b"vary", b"accept-encoding")]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
