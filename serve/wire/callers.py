"""What a request tells about its sender: the keys it presents, its address, whether it is local.

Used by openai_compat.py.
"""

from __future__ import annotations

import re

from starlette.requests import Request

_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
_PROXY_HEADERS = ("forwarded", "via", "x-real-ip")


def request_id(request: Request) -> str:
    return str(request.state.request_id)


def presented_keys(request: Request) -> list[str]:
    """Keys from both headers: platforms put their own token into Authorization."""
    scheme, _, token = request.headers.get("authorization", "").strip().partition(" ")
    keys = [token.strip()] if scheme.lower() == "bearer" else []
    keys.append(request.headers.get("x-api-key", "").strip())
    return [key for key in keys if key]


def client_address(request: Request) -> str:
    return request.client.host if request.client else ""


def is_local_visit(request: Request) -> bool:
    """A browser on this machine, seen directly: a loopback address and name, and no proxy's
    traces (a foreign name that was rebound to this machine is no loopback name)."""
    if any(name.startswith("x-forwarded") or name in _PROXY_HEADERS for name in request.headers):
        return False
    host = re.sub(r":\d+$", "", request.headers.get("host", "")).strip("[]").lower()
    return host in _LOOPBACK_NAMES and client_address(request) in ("127.0.0.1", "::1")
