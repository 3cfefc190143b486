"""Chat messages as clients send them, as Messages.

History is data: whatever an old turn holds (broken arguments, calls without results, other
servers' fields) never fails a new one; only what cannot be understood at all is refused. Used by
chat.py.
"""

from __future__ import annotations

import json
from dataclasses import replace

from serve.errors import InvalidRequest, Unsupported
from serve.values import Message, Part, ReasoningPart, Role, TextPart, ToolCallPart
from serve.wire import bounds
from serve.wire.body import Body
from serve.wire.parts import read_content
from serve.wire.tools import Declared

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")


def read_messages(body: Body, declared: Declared) -> tuple[Message, ...]:
    if not body.list("messages"):
        raise body.wrong("messages", "a non-empty array of messages")
    bounds.MESSAGES.check(len(body.list("messages") or ()), body.at("messages"))
    messages = tuple(_read_message(item, declared) for item in body.objects("messages"))
    check_images(messages, body.at("messages"))
    return messages


def check_images(messages: tuple[Message, ...], where: str) -> None:
    bounds.IMAGES.check(sum(len(message.images) for message in messages), where)


def _read_message(item: Body, declared: Declared) -> Message:
    role = item.one_of("role", tuple(_ROLES))
    if role is None:
        raise item.wrong("role", "one of " + ", ".join(_ROLES))
    parts = read_content(item, "content")
    name = item.text("name", 256)
    if role == "assistant":
        return Message("assistant", _assistant_parts(item, parts, declared), name)
    if role in ("tool", "function"):
        return _tool_result(item, parts, name)
    if role == "user" and not parts:
        return Message("user", (TextPart(""),), name)
    return Message(_ROLES[role], parts, name)


def _tool_result(item: Body, parts: tuple[Part, ...], name: str | None) -> Message:
    call_id = item.text("tool_call_id")
    if call_id is None and item.get("role") == "tool":
        raise InvalidRequest(
            f"'{item.at('tool_call_id')}' is required: it names the call this result answers.",
            param=item.at("tool_call_id"),
        )
    return Message("tool", parts, name, call_id or name)


def _assistant_parts(item: Body, parts: tuple[Part, ...], declared: Declared) -> tuple[Part, ...]:
    if item.has("audio"):
        raise Unsupported(
            f"'{item.at('audio')}': there is no audio here; send the turn's text as content.",
            param=item.at("audio"),
        )
    if item.has("refusal"):
        parts = (*parts, TextPart(item.text("refusal") or ""))
    thought = _thought(item)
    if thought and not any(isinstance(part, ReasoningPart) for part in parts):
        parts = (ReasoningPart(thought), *parts)
    return (*parts, *_calls(item, declared))


def _thought(item: Body) -> str:
    """The turn's chain of thought under the first of its three names; other shapes of these
    fields are other servers' and left alone."""
    for name in _THOUGHT_FIELDS:
        value = item.get(name)
        if isinstance(value, str) and value:
            return value
        if value:
            item.ignore(name)
    return ""


def _calls(item: Body, declared: Declared) -> list[ToolCallPart]:
    calls = [_call(call, i, declared) for i, call in enumerate(item.objects("tool_calls"))]
    legacy = item.object("function_call")
    if legacy is not None:
        call = _call(legacy, 0, declared)
        calls.append(replace(call, id=call.name))
    return calls


def _call(call: Body, index: int, declared: Declared) -> ToolCallPart:
    said = call.object("function") or call.object("custom") or call
    name = declared.flat_name(said.required_text("name"), said.text("namespace"))
    call_id = call.text("id") or call.text("call_id") or f"call_{index}"
    return ToolCallPart(call_id, name, read_arguments(said))


def read_arguments(said: Body) -> str:
    """The string the model wrote, JSON or not; clients that parsed it send an object back."""
    if said.has("input"):
        return json.dumps({"input": said.get("input")}, ensure_ascii=False)
    value = said.get("arguments")
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
