"""What gradio_client may call: /chat, /chat_structured and /models. Stateless, typed, documented.

The same answers as the page and /v1 give; for deltas, tools and logprobs there is /v1. Errors are
gr.Error with the API's own text. page.py calls add_endpoints while the Blocks are being built.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
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
from serve.ui.pace import watch
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


def add_endpoints(service: Service, tenant_of: Callable[[gr.Request | None], str]) -> None:
    """Register the public endpoints with the Blocks being built."""

    async def chat(
        message: str | dict[str, Any],
        history: list[dict[str, Any]] | None = None,
        system: str = "",
        model: str | None = None,
        reasoning_effort: Effort | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
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
        async with contextlib.aclosing(_answers(service, call, tenant_of(request))) as answers:
            async for answer in answers:
                yield answer.text

    async def chat_structured(
        message: str | dict[str, Any],
        history: list[dict[str, Any]] | None = None,
        system: str = "",
        model: str | None = None,
        reasoning_effort: Effort | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
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
        async with contextlib.aclosing(_answers(service, call, tenant_of(request))) as answers:
            async for answer in answers:
                yield _structured(answer)

    def models() -> list[dict[str, Any]]:
        """The served models: id, context length in tokens, and what each can do."""
        return [asdict(card) for card in service.models()]

    api(chat, api_name="chat", concurrency_limit=None)
    api(chat_structured, api_name="chat_structured", concurrency_limit=None)
    api(models, api_name="models", concurrency_limit=None)


def _options(
    system: str,
    model: str | None,
    effort: str | None,
    temperature: float,
    top_p: float,
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


async def _answers(service: Service, call: _Call, tenant: str) -> AsyncGenerator[Answer]:
    """The answer, each time it has grown. Raises gr.Error with the public text of what failed."""
    answer = Answer()
    try:
        request = replace(await _request(service, call, answer), tenant=tenant)
        async with contextlib.aclosing(watch(service.chat(request), answer)) as news:
            async for _ in news:
                if answer.failure is not None:
                    raise answer.failure
                yield answer
    except ServeError as error:
        raise gr.Error(f"{error.code}: {error.message}", print_exception=False) from None


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
    return replace(options.request(_seen(service, options.model, said, answer)))


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
