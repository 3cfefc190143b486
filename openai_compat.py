"""The OpenAI-compatible API's front door: route table, keys, errors to JSON.

`create_api` returns what any FastAPI app takes as keyword arguments (app.py gives it to Gradio's
own). Knows no shapes of requests and answers (serve/wire) and not how an answer is made
(serve/answers.py).
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.exception_handlers import (
    http_exception_handler,
    request_validation_exception_handler,
)
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect

from serve.answers import CLIENT_GONE, Answers
from serve.errors import (
    Forbidden,
    InvalidRequest,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    ServeError,
)
from serve.keys import KeyRing
from serve.limits import Budgets
from serve.service import Service
from serve.settings import Settings
from serve.store import ResponseStore
from serve.wire import about, describe
from serve.wire.body import parse
from serve.wire.callers import client_address, is_local_visit, presented_keys, request_id
from serve.wire.edge import Edge, is_under, route_path
from serve.wire.envelope import envelope, headers
from serve.wire.fields import Field
from serve.wire.fields_chat import CHAT
from serve.wire.fields_completions import COMPLETIONS
from serve.wire.fields_responses import RESPONSES

KEYS_A_MINUTE = 60

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Route:
    """`fields` is the table of its request's fields, for the OpenAPI description."""

    method: str
    path: str
    handler: Handler
    who: Literal["anybody", "any key", "owner"] = "any key"
    fields: Sequence[Field] = ()


def create_api(
    service: Service, keys: KeyRing, settings: Settings, budgets: Budgets | None = None
) -> dict[str, Any]:
    """Keyword arguments for a FastAPI app: routes, middleware, exception_handlers."""
    store = ResponseStore(settings.runtime_dir / "responses.sqlite3")
    answers = Answers(service, keys, settings, budgets or Budgets(settings), store)
    api = Api(service, keys, settings, answers)
    guards = {
        "anybody": [],
        "any key": [Depends(api.any_key)],
        "owner": [Depends(api.owner_key)],
    }
    router = APIRouter()
    for route in api.table:
        router.add_api_route(
            route.path,
            route.handler,
            methods=[route.method],
            response_model=None,
            dependencies=guards[route.who],
            openapi_extra=describe.operation(route.path, route.who != "anybody", route.fields),
        )
    router.add_api_route(
        "/v1/{rest:path}",
        api.nothing_here,
        methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"],
        dependencies=guards["any key"],
        include_in_schema=False,
        response_model=None,
    )
    return {
        "routes": list(router.routes),
        "middleware": [Middleware(Edge)],
        "exception_handlers": {
            ServeError: on_serve_error,
            HTTPException: on_http_exception,
            RequestValidationError: on_invalid,
            ClientDisconnect: on_client_disconnect,
            Exception: on_exception,
        },
    }


class Api:
    def __init__(
        self, service: Service, keys: KeyRing, settings: Settings, answers: Answers
    ) -> None:
        self._service = service
        self._keys = keys
        self._settings = settings
        per_minute = replace(
            settings,
            rate_limit_requests=KEYS_A_MINUTE,
            rate_limit_tokens=0,
            rate_limit_concurrent=0,
        )
        self._key_requests = Budgets(per_minute)
        response = "/v1/responses/{response_id}"
        self.table = (
            Route("GET", "/health", self.health, "anybody"),
            Route("GET", "/ready", self.ready, "anybody"),
            Route("GET", "/ui/key", self.ui_key, "anybody"),
            Route("POST", "/ui/model", self.ui_model, "anybody"),
            Route("GET", "/version", self.version, "owner"),
            Route("GET", "/v1/models", self.models),
            Route("GET", "/v1/models/{name:path}", self.model),
            Route("POST", "/v1/chat/completions", answers.chat_completions, fields=CHAT),
            Route("POST", "/v1/completions", answers.completions, fields=COMPLETIONS),
            Route("POST", "/v1/responses", answers.create_response, fields=RESPONSES),
            Route("POST", "/v1/responses/input_tokens", answers.input_tokens, fields=RESPONSES),
            Route("GET", response, answers.get_response),
            Route("DELETE", response, answers.delete_response),
            Route("POST", f"{response}/cancel", answers.cancel_response),
            Route("GET", f"{response}/input_items", answers.input_items),
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
            {"version": about.VERSION, "libraries": {name: metadata.version(name) for name in used}}
        )

    async def models(self, request: Request) -> Response:
        offered = self._service.status().offered
        return JSONResponse(about.models_json(self._service.models(), offered))

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        served = [card.id for card in self._service.models()]
        if name in self._service.status().offered and name not in served:
            return JSONResponse(about.offered_json(name))
        return JSONResponse(about.model_json(self._service.model(name)))

    async def ui_key(self, request: Request) -> Response:
        """The key that this visitor's page may show; for the page's own scripts only."""
        for_the_page_only(request)
        address = client_address(request)
        self._key_requests.admit(address).close()
        token = request.headers.get("x-owner-token", "")
        offer = self._keys.offer(token, address, is_local_visit(request))
        return JSONResponse(
            {"kind": offer.kind, "key": offer.key, "expires_in": offer.expires_in},
            headers={"cache-control": "no-store"},
        )

    async def ui_model(self, request: Request) -> Response:
        """The page's chooser: {"model": id} has that offered model loaded in place of the served
        one; without a name, after a failure, everything is tried once more."""
        for_the_page_only(request)
        name = str(parse(await request.body()).get("model") or "")
        status = self._service.status()
        self._check_may_switch(request, bool(name))
        if name and name not in status.offered:
            offered = ", ".join(status.offered) or "none"
            raise ModelNotFound(f"{name!r} is not offered here. Offered: {offered}.", param="model")
        if name:
            self._service.switch(name)
        elif status.progress.phase == "failed":
            self._service.load_again()
        return JSONResponse({"wanted": name})

    def _check_may_switch(self, request: Request, is_switch: bool) -> None:
        allowed = self._settings.model_switch
        if is_switch and allowed == "off":
            raise Forbidden("Models are not switched here (MODEL_SWITCH=off).", param="model")
        token = request.headers.get("x-owner-token", "")
        if allowed != "all" and not self._keys.is_owner_visit(token, is_local_visit(request)):
            raise Forbidden("Only the owner of this server may do that (MODEL_SWITCH).")

    async def nothing_here(self, request: Request) -> Response:
        path = route_path(request.scope)
        known = [route for route in self.table if is_under(route.path, "/v1")]
        methods = [route.method for route in known if _fits(route.path, path)]
        if methods and request.method == "OPTIONS":
            return Response(status_code=204, headers={"allow": ", ".join(methods)})
        if methods:
            raise MethodNotAllowed(f"{path} takes {' or '.join(methods)}, not {request.method}.")
        exists = ", ".join(f"{route.method} {route.path.replace(':path', '')}" for route in known)
        raise NotFound(f"There is no {path} here. What exists: {exists}.")


def for_the_page_only(request: Request) -> None:
    if request.headers.get("sec-fetch-site") != "same-origin":
        raise Forbidden("This address is for the page itself; open the page in a browser.")


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


async def on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    if not is_under(route_path(request.scope), "/v1"):
        return await request_validation_exception_handler(request, error)
    return await on_serve_error(request, InvalidRequest("The request is malformed."))


async def on_client_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_GONE)


async def on_exception(request: Request, error: Exception) -> Response:
    """The traceback is in the log (the server writes it); the client gets its request's id."""
    if not is_under(route_path(request.scope), "/v1"):
        return PlainTextResponse("Internal Server Error", 500)
    wrong = ServeError(f"Something broke here; the log has more under {request_id(request)}.")
    # This handler runs outside the middleware that signs answers.
    return JSONResponse(envelope(wrong), 500, headers={"x-request-id": request_id(request)})
