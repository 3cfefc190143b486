"""What a lent GPU needs of the page's server: each request's visitor, where the platform looks.

ZeroGPU's client reads the visitor's token from Gradio's request context, which Gradio sets for its
own events only. This middleware sets it for the API's requests too, so that their GPU time comes
out of the caller's own quota. Put into the app by app.py on ZeroGPU only.
"""

from __future__ import annotations

from gradio.context import LocalContext
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send


class VisitorContext:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1"):
            await self._app(scope, receive, send)
            return
        token = LocalContext.request.set(Request(scope))  # type: ignore[arg-type]
        try:
            await self._app(scope, receive, send)
        finally:
            LocalContext.request.reset(token)
