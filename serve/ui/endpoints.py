"""What gradio_client may call: /chat, /chat_structured and /models. Stateless, typed, documented.

The same answers as the page and /v1 give; for deltas, tools and logprobs there is /v1. Errors are
gr.Error with the API's own text. page.py calls add_endpoints while the Blocks are being built.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gradio as gr
from gradio.events import api
from gradio.utils import get_upload_folder

from serve.errors import InvalidRequest, ModelLoading, ServeError, Unavailable
from serve.service import Service
from serve.ui.answer import Answer
from serve.ui.attachments import read_files
from serve.ui.history import message_from, spoken
from serve.ui.options import options_from, without_pictures
from serve.ui.pace import counted, watch
from serve.ui.visit import VisitOf, visit_from
from serve.values import ChatRequest, Message, Part, TextPart

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Call:
    """One call's arguments, before they are checked."""

    message: Any
    history: list[Json] | None
    options: Json
    files: list[Any] | None


class Endpoints:
    """The public endpoints over a service."""

    def __init__(self, service: Service, visit_of: VisitOf) -> None:
        self._service = service
        self._visit_of = visit_of

    async def chat(
        self,
        message: str | dict[str, Any],
        history: list[dict[str, Any]] | None = None,
        system: str = "",
        model: str | None = None,
        reasoning_effort: Effort | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
        files: list[dict[str, Any]] | None = None,
        request: gr.Request | None = None,
    ) -> AsyncGenerator[str]:
        """Answer a message; each item is the whole answer so far, the last one is complete.

        Stateless: give earlier turns as `history`, [{"role": "user", "content": "…"}, …]. `files`
        (gradio_client's handle_file) may be pictures, text or PDF; {"text", "files"} as `message`
        is accepted too. `reasoning_effort` is for models that have it. For the reasoning, the tool
        calls and the token counts call /chat_structured; for OpenAI clients there is /v1.
        """
        options = _options(system, model, reasoning_effort, temperature, top_p, max_tokens, seed)
        call = _Call(message, history, options, files)
        async with contextlib.aclosing(self._answers(call, request)) as answers:
            async for answer in answers:
                yield answer.text

    async def chat_structured(
        self,
        message: str | dict[str, Any],
        history: list[dict[str, Any]] | None = None,
        system: str = "",
        model: str | None = None,
        reasoning_effort: Effort | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
        files: list[dict[str, Any]] | None = None,
        request: gr.Request | None = None,
    ) -> AsyncGenerator[dict[str, Any]]:
        """Answer a message as /chat does, with everything about the answer.

        Each item is {"text", "reasoning", "tool_calls": [{"id", "name", "arguments"}], "usage",
        "finish_reason", "notes"}; `usage` and `finish_reason` are null until the end.
        """
        options = _options(system, model, reasoning_effort, temperature, top_p, max_tokens, seed)
        call = _Call(message, history, options, files)
        async with contextlib.aclosing(self._answers(call, request)) as answers:
            async for answer in answers:
                yield _structured(answer)

    def models(self) -> list[dict[str, Any]]:
        """The served models: id, context length in tokens, and what each can do."""
        return [asdict(card) for card in self._service.models()]

    async def _answers(self, call: _Call, asking: gr.Request | None) -> AsyncGenerator[Answer]:
        """The answer, each time it has grown. Raises gr.Error with the public text of a failure."""
        answer = Answer()
        visit = visit_from(self._visit_of, asking)
        try:
            request = await _request(self._service, call, answer)
            request = replace(request, tenant=visit.tenant, may_switch=visit.may_switch)
            events = counted(self._service.chat(request), visit)
            async with contextlib.aclosing(watch(events, answer)) as news:
                async for _ in news:
                    if answer.failure is not None:
                        raise answer.failure
                    yield answer
        except ServeError as error:
            raise gr.Error(f"{error.code}: {error.message}", print_exception=False) from None


def add_endpoints(service: Service, visit_of: VisitOf) -> None:
    """Register the public endpoints with the Blocks being built."""
    endpoints = Endpoints(service, visit_of)
    for endpoint in (endpoints.chat, endpoints.chat_structured, endpoints.models):
        api(endpoint, api_name=endpoint.__name__, concurrency_limit=None)


def _options(
    system: str,
    model: str | None,
    effort: str | None,
    temperature: float | None,
    top_p: float | None,
    max_tokens: int | None,
    seed: int | None,
) -> Json:
    return {
        "system": system,
        "model": model,
        "effort": effort,
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "seed": seed,
    }


async def _request(service: Service, call: _Call, answer: Answer) -> ChatRequest:
    options = options_from(call.options)
    text, own_files = spoken(call.message)
    files = [_uploaded(file) for file in [*own_files, *(call.files or [])]]
    said = [message_from(m, f"history[{i}]") for i, m in enumerate(call.history or [])]
    if options.system.strip():
        said.insert(0, Message("system", (TextPart(options.system),)))
    parts: list[Part] = []
    for attached in await asyncio.to_thread(read_files, files):
        if (part := attached.part()) is None:
            raise InvalidRequest(f"{attached.name} cannot be read: {attached.note}.", param="files")
        parts.append(part)
    said.append(Message("user", (*parts, TextPart(text))))
    return options.request(_seen(service, options.model, said, answer))


def _seen(
    service: Service, model: str, said: Sequence[Message], answer: Answer
) -> Sequence[Message]:
    try:
        card = service.model(model)
    except (ModelLoading, Unavailable):
        return said  # the service will say so itself
    if card.capabilities.vision is False and any(message.images for message in said):
        answer.notes.append({"code": "images_not_used", "model": card.id})
        return without_pictures(said)
    return said


def _uploaded(file: Any) -> str:
    """The path of a file that was uploaded here; any other path of this machine is refused."""
    given = file.get("path") if isinstance(file, dict) else file
    path = Path(str(given or "")).resolve()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()) or not path.is_file():
        raise InvalidRequest(
            "files must be uploaded: use gradio_client.handle_file.", param="files"
        )
    return str(path)


def _structured(answer: Answer) -> Json:
    snapshot = answer.snapshot()
    has_ended = answer.has_ended
    return {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "tool_calls": answer.calls,
        "usage": snapshot["stats"] if has_ended else None,
        "finish_reason": answer.finish_reason if has_ended else None,
        "notes": answer.notes,
    }
