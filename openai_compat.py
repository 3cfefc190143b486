"""The OpenAI-compatible API's routes: keys, budgets, errors to JSON, answers whole or streamed.

`create_api` returns what any FastAPI app takes as keyword arguments (app.py gives it to Gradio's
own). Knows no shapes of requests and answers: those are serve/wire's. Handlers parse, ask the
service, encode.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from serve.errors import Forbidden, MethodNotAllowed, NotFound, ServeError
from serve.keys import Identity, KeyRing
from serve.limits import Budgets
from serve.service import Service
from serve.settings import Settings
from serve.values import Event, ModelCard
from serve.wire import about, chat
from serve.wire.body import Body, parse
from serve.wire.chat_answer import ChunkWriter, Fold, Head
from serve.wire.edge import Edge, is_under, route_path
from serve.wire.envelope import envelope, headers
from serve.wire.sse import EventStream, Turn, collect

VERSION = "0.1.0"
BIG_BODY_BYTES = 512 * 1024
KEYS_A_MINUTE = 60
CLIENT_GONE = 499

Handler = Callable[[Request], Awaitable[Response]]
Call = TypeVar("Call")


@dataclass(frozen=True, slots=True)
class Route:
    """`who` may call it: anybody, any key, or the owner's key."""

    method: str
    path: str
    handler: Handler
    who: str = "key"


def create_api(
    service: Service, keys: KeyRing, settings: Settings, budgets: Budgets | None = None
) -> dict[str, Any]:
    """Keyword arguments for a FastAPI app: routes, middleware, exception_handlers."""
    api = Api(service, keys, settings, budgets or Budgets(settings))
    guards = {"anybody": [], "key": [Depends(api.any_key)], "owner": [Depends(api.owner_key)]}
    router = APIRouter()
    for route in api.routes():
        router.add_api_route(
            route.path,
            route.handler,
            methods=[route.method],
            response_model=None,
            dependencies=guards[route.who],
        )
    router.add_api_route(
        "/v1/{rest:path}",
        api.nothing_here,
        methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"],
        dependencies=guards["key"],
        include_in_schema=False,
        response_model=None,
    )
    return {
        "routes": list(router.routes),
        "middleware": [Middleware(Edge)],
        "exception_handlers": {
            ServeError: on_serve_error,
            HTTPException: on_http_exception,
            ClientDisconnect: on_client_disconnect,
            Exception: on_exception,
        },
    }


class Api:
    def __init__(
        self, service: Service, keys: KeyRing, settings: Settings, budgets: Budgets
    ) -> None:
        self._service = service
        self._keys = keys
        self._settings = settings
        self._budgets = budgets
        per_minute = replace(
            settings,
            rate_limit_requests=KEYS_A_MINUTE,
            rate_limit_tokens=0,
            rate_limit_concurrent=0,
        )
        self._key_requests = Budgets(per_minute)

    def routes(self) -> tuple[Route, ...]:
        return (
            Route("GET", "/health", self.health, "anybody"),
            Route("GET", "/ready", self.ready, "anybody"),
            Route("GET", "/ui/key", self.ui_key, "anybody"),
            Route("GET", "/version", self.version, "owner"),
            Route("GET", "/v1/models", self.models),
            Route("GET", "/v1/models/{name:path}", self.model),
            Route("POST", "/v1/chat/completions", self.chat_completions),
        )

    # -- who calls ---------------------------------------------------------------------------------

    async def any_key(self, request: Request) -> None:
        """The dependency of every locked route."""
        request.state.caller = self._keys.identify(presented_keys(request))

    async def owner_key(self, request: Request) -> None:
        await self.any_key(request)
        if not request.state.caller.is_owner:
            raise Forbidden("A guest key opens the chat routes only; this needs the owner's key.")

    # -- what serves -------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        stats = self._service.engine_stats()
        is_alive = stats is None or stats.is_alive
        told: dict[str, Any] = {"status": "ok" if is_alive else "engine dead"}
        if stats is not None:
            told["last_step_age_seconds"] = round(stats.last_step_age_seconds, 1)
        return JSONResponse(told, 200 if is_alive else 503)

    async def ready(self, request: Request) -> Response:
        status = self._service.status()
        told = about.ready_json(status)
        if status.is_ready:
            return JSONResponse(told)
        return JSONResponse(told, 503, headers={"retry-after": "5"})

    async def version(self, request: Request) -> Response:
        used = ("gradio", "fastapi", "transformers", "torch")
        return JSONResponse(
            {"version": VERSION, "libraries": {name: metadata.version(name) for name in used}}
        )

    async def models(self, request: Request) -> Response:
        return JSONResponse(about.models_json(self._service.models()))

    async def model(self, request: Request) -> Response:
        return JSONResponse(about.model_json(self._service.model(request.path_params["name"])))

    async def ui_key(self, request: Request) -> Response:
        """The key that this visitor's page may show; for the page's own scripts only."""
        if request.headers.get("sec-fetch-site") != "same-origin":
            raise Forbidden("This address is for the page itself; open the page in a browser.")
        address = client_address(request)
        self._key_requests.admit(address).close()
        token = request.headers.get("x-owner-token", "")
        offer = self._keys.offer(token, address, is_local_visit(request))
        return JSONResponse(
            {"kind": offer.kind, "key": offer.key, "expires_in": offer.expires_in},
            headers={"cache-control": "no-store"},
        )

    async def nothing_here(self, request: Request) -> Response:
        path = route_path(request.scope)
        known = [route for route in self.routes() if is_under(route.path, "/v1")]
        methods = [route.method for route in known if _fits(route.path, path)]
        if methods and request.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": ", ".join(methods)})
        if methods:
            raise MethodNotAllowed(f"{path} takes {' or '.join(methods)}, not {request.method}.")
        exists = ", ".join(f"{route.method} {route.path.replace(':path', '')}" for route in known)
        raise NotFound(f"There is no {path} here. What exists: {exists}.")

    # -- answers -----------------------------------------------------------------------------------

    async def chat_completions(self, request: Request) -> Response:
        caller: Identity = request.state.caller
        call = await read(request, lambda body: chat.read(body, caller.tenant, id_of(request)))
        asked = replace(call.request, may_switch=self._may_switch(caller))
        turn, told = await self._begin(request, self._service.chat(asked), call.ignored)
        head = self._head("chatcmpl-", asked.model)
        n = asked.sampling.n
        if call.stream:
            return EventStream(turn, ChunkWriter(head, n, call.include_usage).event, told)
        fold = Fold(head, n, call.metadata)
        if not await collect(turn, fold.event, request):
            return Response(status_code=CLIENT_GONE)
        return JSONResponse(fold.body(), headers=told)

    async def _begin(
        self, request: Request, events: AsyncGenerator[Event], ignored: Iterable[str]
    ) -> tuple[Turn, dict[str, str]]:
        """The request's place in its budget, its first event pulled, and the answer's headers."""
        ticket = self._budgets.admit(request.state.caller.bucket)
        turn = Turn(events, [ticket])
        await turn.begin()
        told = dict(ticket.headers)
        left_alone = ", ".join(re.sub(r"[^\w.\[\]=-]", "?", name[:80]) for name in ignored)
        if left_alone:
            told["x-ignored-fields"] = left_alone.encode("ascii", "replace").decode()[:1000]
        return turn, told

    def _may_switch(self, caller: Identity) -> bool:
        allowed = self._settings.model_switch
        return allowed == "all" or (allowed == "owner" and caller.is_owner)

    def _head(self, prefix: str, asked_model: str) -> Head:
        cards = self._service.models()
        card = cards[0] if cards else ModelCard(asked_model, 0)
        return Head(
            prefix + secrets.token_hex(16),
            card.id,
            about.fingerprint(card, VERSION),
            int(time.time()),
        )


# ---- requests -----------------------------------------------------------------------------------


async def read(request: Request, reader: Callable[[Body], Call]) -> Call:
    """The body through `reader`; a big one on a thread, so that others' streams go on."""
    raw = await request.body()
    if len(raw) < BIG_BODY_BYTES:
        return reader(parse(raw))
    return await asyncio.to_thread(lambda: reader(parse(raw)))


def id_of(request: Request) -> str:
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
    traces (a rebound foreign name is no loopback name)."""
    names = ("127.0.0.1", "localhost", "::1")
    through = any(name.startswith("x-forwarded") or name in ("forwarded", "via", "x-real-ip")
                  for name in request.headers)  # fmt: skip
    host = re.sub(r":\d+$", "", request.headers.get("host", "")).strip("[]").lower()
    return not through and host in names and client_address(request) in ("127.0.0.1", "::1")


def _fits(template: str, path: str) -> bool:
    pattern = re.sub(r"\\{\w+(:path)?\\}", lambda m: ".+" if m[1] else "[^/]+", re.escape(template))
    return re.fullmatch(pattern, path) is not None


# ---- errors -------------------------------------------------------------------------------------


async def on_serve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    return JSONResponse(envelope(error), error.status, headers=headers(error))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Ours speak the envelope; Gradio's own routes keep their shapes."""
    assert isinstance(error, HTTPException)
    if not is_under(route_path(request.scope), "/v1"):
        return await http_exception_handler(request, error)
    wrong = ServeError(str(error.detail))
    return JSONResponse(envelope(wrong), error.status_code, headers=error.headers)


async def on_client_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def on_exception(request: Request, error: Exception) -> Response:
    """The traceback is in the log (the server writes it); the client gets its request's id."""
    if not is_under(route_path(request.scope), "/v1"):
        return PlainTextResponse("Internal Server Error", 500)
    wrong = ServeError(f"Something broke here; the log has more under {id_of(request)}.")
    # This handler runs outside the middleware that signs answers.
    return JSONResponse(envelope(wrong), 500, headers={"x-request-id": id_of(request)})
