"""Lets the platform see which visitor a request to our own routes is of.

Gradio notes the request of its own events; ZeroGPU reads it there to charge the visitor's quota
instead of the anonymous one. This middleware does the same for every other route. Added by app.py
on ZeroGPU only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradio.context import LocalContext
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send


class VisitorContext:
    """`page` gives the Blocks, whose sockets the platform closes in its workers."""

    def __init__(self, app: ASGIApp, page: Callable[[], Any]) -> None:
        self._app = app
        self._page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            LocalContext.request.set(Request(scope))  # type: ignore[arg-type]
            LocalContext.blocks.set(self._page())
        await self._app(scope, receive, send)
