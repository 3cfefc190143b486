"""/v1/responses, the asking half, pure: a body and the conversation before it to a ChatRequest.

The answering half is responses_answer.py. A body of this shape on the chat route is read here
too. Knows no HTTP, no tokens and no store. Used by openai_compat.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.errors import Unsupported
from serve.values import ChatRequest, Message, ResponseFormat, TextPart
from serve.wire import bounds, fields
from serve.wire.body import Body
from serve.wire.chat import ChatCall, insert_after_instructions, read_stream
from serve.wire.fields_chat import CHAT
from serve.wire.fields_responses import RESPONSES
from serve.wire.items import ItemReader, OpenSealed
from serve.wire.messages import check_images
from serve.wire.options import (
    read_effort,
    read_format,
    read_metadata,
    read_template_options,
    read_verbosity,
)
from serve.wire.sampling import MOST_TOKENS, read_sampling, read_top_logprobs
from serve.wire.tools import Declared, read_tool_choice, read_tools

INCLUDABLE = (
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
    "message.input_image.image_url",
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
)


@dataclass(frozen=True, slots=True)
class ResponsesCall:
    """A request as it was read. `echo` are the fields that the answer repeats; `items` is this
    turn's input, each with an id, as it is stored."""

    request: ChatRequest
    declared: Declared
    echo: Mapping[str, Any]
    items: Sequence[Mapping[str, Any]] = ()
    stream: bool = False
    is_stored: bool = True
    previous: str | None = None
    has_auto_truncation: bool = False
    include: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = field(default=())


def is_responses_shaped(body: Body) -> bool:
    """A Responses body sent to the chat route, as Cursor's agent mode does."""
    return body.has("input") and not body.has("messages")


def read(
    body: Body,
    open_sealed: OpenSealed,
    tenant: str = "",
    request_id: str = "",
    history: Sequence[Mapping[str, Any]] = (),
) -> ResponsesCall:
    """`history` are the stored items that come before. Raises InvalidRequest or Unsupported
    naming the field."""
    fields.check(body, RESPONSES)
    declared = read_tools(body)
    items = _read_items(body)
    text = body.object("text")
    include = _read_include(body)
    request = ChatRequest(
        messages=_messages(body, history, items, ItemReader(declared, open_sealed)),
        sampling=read_sampling(
            body,
            max_tokens=body.whole("max_output_tokens", 1, MOST_TOKENS),
            logprobs=_logprobs(body, include),
        ),
        model=body.text("model", 256) or "default",
        tools=declared.tools,
        tool_choice=read_tool_choice(body, declared),
        parallel_tool_calls=body.flag("parallel_tool_calls") is not False,
        response_format=ResponseFormat() if text is None else read_format(text, "format"),
        reasoning_effort=read_effort(body),
        template_options=read_template_options(body),
        tenant=tenant,
        request_id=request_id,
    )
    return ResponsesCall(
        request,
        declared,
        _echo(body, request),
        items,
        stream=body.flag("stream") or False,
        is_stored=body.flag("store") is not False,
        previous=body.text("previous_response_id"),
        has_auto_truncation=body.one_of("truncation", ("auto", "disabled")) == "auto",
        include=include,
        ignored=tuple(body.ignored),
    )


def read_as_chat(
    body: Body, open_sealed: OpenSealed, tenant: str = "", request_id: str = ""
) -> ChatCall:
    """The same, to be answered as a chat completion; chat's names for the same things are taken."""
    if body.has("previous_response_id"):
        raise Unsupported(
            "'previous_response_id' works on /v1/responses only.", param="previous_response_id"
        )
    renamed = _with_responses_names(body)
    _, include_usage = read_stream(body)
    call = read(Body(renamed), open_sealed, tenant, request_id)
    return ChatCall(call.request, call.stream, include_usage, read_metadata(body), call.ignored)


def ever_shorter(messages: Sequence[Message]) -> list[tuple[Message, ...]]:
    """`messages`, then without the oldest turn, the two oldest, …; instructions and the last turn
    stay. A turn begins with a user's message."""
    start = 0
    while start < len(messages) and messages[start].role in ("system", "developer"):
        start += 1
    kept, rest = tuple(messages[:start]), tuple(messages[start:])
    begins = [i for i, message in enumerate(rest) if i > 0 and message.role == "user"]
    return [(*kept, *rest[i:]) for i in (0, *begins)]


def _with_responses_names(body: Body) -> dict[str, Any]:
    found = {name: value for name, value in body.data.items() if value is not None}
    for name in ("max_completion_tokens", "max_tokens"):
        if name in found:
            found.setdefault("max_output_tokens", found.pop(name))
    if "response_format" in found:
        form = body.required_object("response_format")
        flat = form.object("json_schema")
        said = dict(form.data) if flat is None else {**flat.data, "type": "json_schema"}
        text = body.object("text")
        found["text"] = {**(text.data if text else {}), "format": said}
        del found["response_format"]
    if found.get("n") == 1:
        del found["n"]
    known = {row.name for row in RESPONSES}
    for row in CHAT:
        if row.name in found and row.name not in known and row.standing == "honoured":
            raise Unsupported(
                f"'{row.name}' does not go with 'input'; send messages instead.", param=row.name
            )
    return found


def _messages(
    body: Body,
    history: Sequence[Mapping[str, Any]],
    items: Sequence[Mapping[str, Any]],
    reader: ItemReader,
) -> tuple[Message, ...]:
    bounds.MESSAGES.check(len(history) + len(items), "input")
    placed = [Body(item, "previous_response_id", body.ignored) for item in history]
    placed += [Body(item, f"input[{i}]", body.ignored) for i, item in enumerate(items)]
    messages = reader.read(placed) or (Message("user", (TextPart(""),)),)
    check_images(messages, "input")
    instructions = body.text("instructions")
    if instructions:
        messages = (Message("system", (TextPart(instructions),)), *messages)
    text = body.object("text")
    return insert_after_instructions(messages, read_verbosity(text) if text else ())


def _is_text(body: Body) -> bool:
    return isinstance(body.get("input"), str)


def _read_items(body: Body) -> list[dict[str, Any]]:
    """The input as items, each with a type and an id, as input_items lists them."""
    if _is_text(body):
        content = [{"type": "input_text", "text": body.get("input")}]
        given: list[dict[str, Any]] = [{"role": "user", "content": content}]
    else:
        if body.list("input") is None:
            raise body.wrong("input", "a string or an array of items")
        given = [dict(item.data) for item in body.objects("input")]
    for item in given:
        if not item.get("type") and item.get("role"):
            item["type"] = "message"
        if not isinstance(item.get("id"), str):
            item["id"] = f"msg_{secrets.token_hex(12)}"
    return given


def _read_include(body: Body) -> frozenset[str]:
    wanted = body.list("include") or []
    for name in wanted:
        if name not in INCLUDABLE:
            raise body.wrong("include", "an array of " + ", ".join(INCLUDABLE))
    return frozenset(wanted)


def _logprobs(body: Body, include: frozenset[str]) -> int | None:
    top = read_top_logprobs(body)
    if "message.output_text.logprobs" in include:
        return top or 0
    return top or None


def _echo(body: Body, request: ChatRequest) -> dict[str, Any]:
    text = body.object("text")
    reasoning = body.object("reasoning")
    return {
        "background": False,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": body.whole("max_tool_calls", 1, MOST_TOKENS),
        "metadata": read_metadata(body) or {},
        "parallel_tool_calls": request.parallel_tool_calls,
        "previous_response_id": body.get("previous_response_id"),
        "prompt_cache_key": body.text("prompt_cache_key"),
        "reasoning": {
            "effort": request.reasoning_effort,
            "summary": None if reasoning is None else reasoning.get("summary"),
        },
        "safety_identifier": body.text("safety_identifier"),
        "service_tier": "default",
        "store": body.flag("store") is not False,
        "temperature": request.sampling.temperature,
        "text": {"format": {"type": "text"}} | (dict(text.data) if text else {}),
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": [_echo_tool(tool) for tool in body.list("tools") or []],
        "top_logprobs": request.sampling.logprobs or 0,
        "top_p": body.number("top_p", 0, 1) if body.has("top_p") else 1.0,
        "truncation": body.get("truncation") or "disabled",
        "user": body.text("user"),
    }


def _echo_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Flat, as the SDK's types read it, whichever way it was sent."""
    if tool.get("type", "function") != "function":
        return dict(tool)
    said = tool.get("function") if isinstance(tool.get("function"), Mapping) else tool
    return {"parameters": None, "strict": False, **(said or {}), "type": "function"}
