"""The routes that make the model answer: chat completions, completions, responses.

Each handler parses, asks the service, encodes; around that stand the caller's budget, the chain of
thought kept between tool calls, and the store of responses. Knows no shapes of requests and
answers: those are serve/wire's. Used by openai_compat.py, which owns paths, keys and errors.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import sqlite3
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serve import pictures
from serve.addresses import Fetcher
from serve.errors import InvalidRequest, Unsupported
from serve.keys import Identity, KeyRing
from serve.limits import Budgets
from serve.memory import ThoughtMemory
from serve.service import Service
from serve.settings import Settings
from serve.store import ResponseStore, StoredResponse
from serve.values import ChatRequest, Event, ImagePart, ModelCard
from serve.wire import about, chat, completions, responses
from serve.wire.body import Body, parse
from serve.wire.callers import request_id
from serve.wire.chat_answer import ChunkWriter, Fold, Head
from serve.wire.completions import CompletionFold, CompletionWriter
from serve.wire.parts import with_pictures, without_pictures
from serve.wire.responses_answer import ResponseBuilder
from serve.wire.responses_list import listed
from serve.wire.seal import Seal
from serve.wire.sse import EventStream, Turn, Watcher, collect
from serve.wire.together import together

log = logging.getLogger(__name__)

BIG_BODY_BYTES = 512 * 1024
CANCEL_SECONDS = 10.0
CLIENT_GONE = 499

Call = TypeVar("Call")


@dataclass(slots=True)
class _Running:
    """A response that is being made; a watcher of its turn, so that its end is noticed."""

    tenant: str
    builder: ResponseBuilder
    turn: Turn | None = None
    has_ended: asyncio.Event = field(default_factory=asyncio.Event)

    def see(self, event: Event) -> None:
        pass

    def close(self) -> None:
        self.has_ended.set()


class Answers:
    """`store` keeps responses; all other state is in memory and bounded."""

    def __init__(
        self,
        service: Service,
        keys: KeyRing,
        settings: Settings,
        budgets: Budgets,
        store: ResponseStore,
    ) -> None:
        self._service = service
        self._settings = settings
        self._budgets = budgets
        self._store = store
        self._seal = Seal(keys.server_secret)
        self._memory = ThoughtMemory()
        self._fetcher = Fetcher(settings.allow_image_urls)
        self._running: dict[str, _Running] = {}

    # -- chat completions and completions ----------------------------------------------------------

    async def chat_completions(self, request: Request) -> Response:
        call = await _read(request, partial(self._read_chat, request))
        asked = await self._prepared(request, call.request)
        turn, told = await self._begin_chat(request, asked, call.ignored)
        head, n = self._head("chatcmpl-", call.request.model), call.request.sampling.n
        if call.stream:
            return EventStream(turn, ChunkWriter(head, n, call.include_usage).event, told)
        return await _whole(request, turn, Fold(head, n, call.metadata), told)

    def _read_chat(self, request: Request, body: Body) -> chat.ChatCall:
        tenant = request.state.caller.tenant
        if responses.is_responses_shaped(body):
            opener = partial(self._seal.open, tenant=tenant)
            return responses.read_as_chat(body, opener, tenant, request_id(request))
        return chat.read(body, tenant, request_id(request))

    async def completions(self, request: Request) -> Response:
        tenant = request.state.caller.tenant
        reader = partial(completions.read, tenant=tenant, request_id=request_id(request))
        call = await _read(request, reader)
        may_switch = self._may_switch(request)
        asked = [replace(one, may_switch=may_switch) for one in call.requests]
        events = together([self._service.complete(one) for one in asked], call.n)
        turn, told = await self._begin(request, events, call.ignored)
        head = self._head("cmpl-", asked[0].model)
        if call.stream:
            writer = CompletionWriter(head, call.starts, call.include_usage)
            return EventStream(turn, writer.event, told)
        return await _whole(request, turn, CompletionFold(head, call.starts), told)

    # -- responses ---------------------------------------------------------------------------------

    async def create_response(self, request: Request) -> Response:
        call = await _read(request, partial(self._read_response, request))
        asked = await self._prepared(request, call.request)
        if call.has_auto_truncation:
            asked = await self._fitted(asked)
        head = self._head("resp_", asked.model)
        builder = ResponseBuilder(
            head, self._echo(call), call.declared, self._closer(call), partial(self._keep, call)
        )
        running = _Running(asked.tenant, builder)
        turn, told = await self._begin_chat(request, asked, call.ignored, running)
        running.turn = turn
        self._register(head.id, running)
        if call.stream:
            return EventStream(turn, builder.event, told)
        return await _whole(request, turn, builder, told)

    def _read_response(self, request: Request, body: Body) -> responses.ResponsesCall:
        tenant = request.state.caller.tenant
        previous = body.text("previous_response_id")
        history = self._store.conversation(tenant, previous) if previous else []
        opener = partial(self._seal.open, tenant=tenant)
        return responses.read(body, opener, tenant, request_id(request), history)

    def _echo(self, call: responses.ResponsesCall) -> dict[str, Any]:
        """The request's own fields, and what the model's makers say where it said nothing."""
        card = self._service.card(call.request.model)
        left_open = {"temperature", "top_p"} & set(call.request.sampling.unset) if card else ()
        return {**call.echo, **{n: getattr(card.defaults, n) for n in left_open if card}}

    def _closer(self, call: responses.ResponsesCall) -> Callable[[str], str] | None:
        if "reasoning.encrypted_content" not in call.include:
            return None
        return partial(self._seal.close, tenant=call.request.tenant)

    def _keep(self, call: responses.ResponsesCall, body: dict[str, Any]) -> bool:
        """Whether the response can be asked for later."""
        if not call.is_stored:
            return False
        stored = StoredResponse(
            body["id"], call.previous, [dict(item) for item in call.items], body
        )
        try:
            self._store.put(call.request.tenant, stored)
        except sqlite3.Error:
            log.exception("a response could not be stored; it says store: false")
            return False
        return True

    def _register(self, response_id: str, running: _Running) -> None:
        for ended in [k for k, v in self._running.items() if v.has_ended.is_set()]:
            del self._running[ended]
        self._running[response_id] = running

    def _running_of(self, request: Request) -> _Running | None:
        running = self._running.get(request.path_params["response_id"])
        if running is None or running.has_ended.is_set():
            return None
        return running if running.tenant == request.state.caller.tenant else None

    async def _stored(self, request: Request) -> StoredResponse:
        caller: Identity = request.state.caller
        response_id = request.path_params["response_id"]
        return await asyncio.to_thread(self._store.get, caller.tenant, response_id)

    async def get_response(self, request: Request) -> Response:
        if request.query_params.get("stream", "false") != "false":
            raise InvalidRequest("A stored response cannot be streamed again.", param="stream")
        running = self._running_of(request)
        if running is not None:
            return JSONResponse(running.builder.body())
        return JSONResponse((await self._stored(request)).response)

    async def delete_response(self, request: Request) -> Response:
        caller: Identity = request.state.caller
        response_id = request.path_params["response_id"]
        await asyncio.to_thread(self._store.delete, caller.tenant, response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    async def cancel_response(self, request: Request) -> Response:
        running = self._running_of(request)
        if running is None or running.turn is None:
            status = (await self._stored(request)).response["status"]
            raise InvalidRequest(f"This response is {status} already; only a running one stops.")
        running.builder.is_cancelled_by_client = True
        running.turn.cancel()
        async with asyncio.timeout(CANCEL_SECONDS):
            await running.has_ended.wait()
            while not running.builder.has_ended:  # its last events are still being written
                await asyncio.sleep(0.01)
        return JSONResponse(running.builder.body())

    async def input_items(self, request: Request) -> Response:
        stored = await self._stored(request)
        tenant = request.state.caller.tenant
        before: list[dict[str, Any]] = []
        if stored.previous is not None:
            before = await asyncio.to_thread(self._store.conversation, tenant, stored.previous)
        return JSONResponse(listed([*before, *stored.items], request.query_params))

    async def input_tokens(self, request: Request) -> Response:
        call = await _read(request, partial(self._read_response, request))
        count = await self._service.count(await self._prepared(request, call.request))
        return JSONResponse({"object": "response.input_tokens", "input_tokens": count})

    async def _fitted(self, asked: ChatRequest) -> ChatRequest:
        """Without the oldest turns that do not fit the context; by bisection, since a longer
        prompt never has fewer tokens."""
        card = self._service.model(asked.model)
        room = card.context_length - (asked.sampling.max_tokens or 1)
        shorter = responses.ever_shorter(asked.messages)
        low, high = 0, len(shorter) - 1
        while low < high:
            middle = (low + high) // 2
            count = await self._service.count(replace(asked, messages=shorter[middle]))
            low, high = (low, middle) if count <= room else (middle + 1, high)
        return replace(asked, messages=shorter[low])

    # -- what all have in common -------------------------------------------------------------------

    async def _prepared(self, request: Request, asked: ChatRequest) -> ChatRequest:
        """With its pictures fetched and the thoughts that the client dropped put back, and without
        an effort that the model knows nothing of."""
        asked = self._memory.restore(await self._illustrated(request, asked))
        asked = self._without_idle_effort(request, asked)
        return replace(asked, may_switch=self._may_switch(request))

    def _without_idle_effort(self, request: Request, asked: ChatRequest) -> ChatRequest:
        """Agents send a reasoning effort to whatever model they meet. One that does not reason
        answers as it would without it, and the answer's header says that it was left alone."""
        options = dict(asked.template_options)
        effort = options.pop("reasoning_effort", None) or asked.reasoning_effort
        card = self._service.card(asked.model)
        if effort in (None, "none") or card is None or card.capabilities.reasoning is not False:
            return asked
        request.state.left_alone = ("reasoning_effort",)
        return replace(asked, reasoning_effort=None, template_options=options)

    async def _begin_chat(
        self,
        request: Request,
        asked: ChatRequest,
        ignored: Iterable[str],
        *watchers: Watcher,
    ) -> tuple[Turn, dict[str, str]]:
        recorder = self._memory.recorder(asked.tenant)
        return await self._begin(request, self._service.chat(asked), ignored, recorder, *watchers)

    async def _illustrated(self, request: Request, asked: ChatRequest) -> ChatRequest:
        """With pictures fetched that it names by address, or without them (and a header that says
        how many) where the model sees nothing and IMAGE_FALLBACK is "drop". Raises Unsupported or
        InvalidRequest."""
        places = [image for message in asked.messages for image in message.images]
        if not places:
            return asked
        card = self._service.card(asked.model)
        if card is not None and card.capabilities.vision is False:
            if self._settings.image_fallback == "refuse":
                where = places[0].where or "messages"
                raise Unsupported(
                    f"'{where}': {card.id} reads no pictures; send text only.", param=where
                )
            request.state.pictures_left_out = len(places)
            return replace(asked, messages=without_pictures(asked.messages))
        found = {
            image: await self._fetched(image) for image in places if image.url and not image.data
        }
        return replace(asked, messages=with_pictures(asked.messages, found))

    async def _fetched(self, image: ImagePart) -> ImagePart:
        data = await self._fetcher.get(image.url, image.where)
        return replace(image, data=data, media_type=pictures.check(data, image.where), url="")

    async def _begin(
        self,
        request: Request,
        events: AsyncGenerator[Event],
        ignored: Iterable[str],
        *watchers: Watcher,
    ) -> tuple[Turn, dict[str, str]]:
        """The request's place in its budget, its first event pulled, and the answer's headers."""
        ticket = self._budgets.admit(request.state.caller.bucket)
        turn = Turn(events, (ticket, *watchers))
        await turn.begin()
        told = dict(ticket.headers)
        names = (*ignored, *getattr(request.state, "left_alone", ()))
        left_alone = ", ".join(re.sub(r"[^\w.\[\]=-]", "?", name[:80]) for name in names)
        if left_alone:
            told["x-ignored-fields"] = left_alone.encode("ascii", "replace").decode()[:1000]
        left_out = getattr(request.state, "pictures_left_out", 0)
        if left_out:
            told["x-images-not-used"] = str(left_out)
        return turn, told

    def _may_switch(self, request: Request) -> bool:
        caller: Identity = request.state.caller
        allowed = self._settings.model_switch
        return allowed == "all" or (allowed == "owner" and caller.is_owner)

    def _head(self, prefix: str, asked_model: str) -> Head:
        card = self._service.card(asked_model) or ModelCard(asked_model, 0)
        return Head(
            prefix + secrets.token_hex(16), card.id, about.fingerprint(card), int(time.time())
        )


async def _read(request: Request, reader: Callable[[Body], Call]) -> Call:
    """The body through `reader`; on a thread where that may take long, so that others' streams
    go on."""
    raw = await request.body()
    if len(raw) < BIG_BODY_BYTES and b"previous_response_id" not in raw:
        return reader(parse(raw))
    return await asyncio.to_thread(lambda: reader(parse(raw)))


async def _whole(
    request: Request,
    turn: Turn,
    fold: Fold | CompletionFold | ResponseBuilder,
    headers: dict[str, str],
) -> Response:
    if not await collect(turn, fold.event, request):
        return Response(status_code=CLIENT_GONE)
    fold.check()
    return JSONResponse(fold.body(), headers=headers)
