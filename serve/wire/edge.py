"""What every request meets first: a clean Host, an id of ours, and a limit on the body.

Raw ASGI, so that streams pass untouched. The id is always made here; a client's own is only
echoed, cleaned, in a header of its own. Put into the app by openai_compat.py.
"""

from __future__ import annotations

import json
import re
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import InvalidRequest, ServeError, TooLarge
from serve.wire.bounds import BODY_BYTES
from serve.wire.envelope import envelope

_HOST = re.compile(r"[A-Za-z0-9._:\[\]-]{1,255}")
_OURS = ("/v1", "/health", "/ready", "/version", "/ui/key", "/ui/model")


def is_under(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + "/")


def route_path(scope: Scope) -> str:
    """The path as the router sees it: never the URL, which a Host header can bend."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and is_under(path, root) else path


class Edge:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) > 1 or not all(_HOST.fullmatch(host) for host in hosts):
            await _refuse(InvalidRequest("The Host header is malformed."), send)
            return
        path = route_path(scope)
        if not any(is_under(path, ours) for ours in _OURS):
            await self._app(scope, receive, send)
            return
        request_id = "req_" + secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        signed = _signed(send, request_id, _echo(headers))
        if _declared_length(headers) > BODY_BYTES:
            await _refuse(_too_large(), signed)
            return
        await self._app(scope, _limited(receive), signed)


def _signed(send: Send, request_id: str, echo: str) -> Send:
    async def signed(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = request_id
            headers.setdefault("cache-control", "no-store")
            if echo:
                headers["x-client-request-id"] = echo
        await send(message)

    return signed


def _echo(headers: Headers) -> str:
    given = headers.get("x-client-request-id") or headers.get("x-request-id") or ""
    return re.sub(r"[^A-Za-z0-9._-]", "", given)[:128]


def _declared_length(headers: Headers) -> int:
    length = headers.get("content-length", "")
    return int(length) if re.fullmatch(r"\d{1,18}", length, re.ASCII) else 0


def _limited(receive: Receive) -> Receive:
    """Raises TooLarge into whoever reads the body."""
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > BODY_BYTES:
            raise _too_large()
        return message

    return limited


def _too_large() -> TooLarge:
    return TooLarge(f"The request body is over {BODY_BYTES // 2**20} MB, the most allowed.")


async def _refuse(error: ServeError, send: Send) -> None:
    body = json.dumps(envelope(error)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
