"""On a lent GPU the API's requests carry their visitor to where the platform looks."""

from __future__ import annotations

import asyncio

from gradio.context import LocalContext
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from serve.ui.visitor import VisitorContext


async def seen(request: Request) -> PlainTextResponse:
    def in_a_thread() -> str:
        visitor = LocalContext.request.get(None)
        return visitor.headers.get("x-ip-token", "no token") if visitor else "nobody"

    return PlainTextResponse(await asyncio.to_thread(in_a_thread))


def test_the_visitors_token_is_in_the_context_of_each_request_alone() -> None:
    app = Starlette(
        routes=[Route("/v1/x", seen)],
        middleware=[Middleware(VisitorContext, page=lambda: None)],
    )
    client = TestClient(app)
    assert client.get("/v1/x", headers={"x-ip-token": "abc"}).text == "abc"
    assert client.get("/v1/x").text == "no token"
