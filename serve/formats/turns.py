"""Our messages as the plain dictionaries that Hugging Face chat templates read.

What a template can take differs (a system turn or none, strings or lists of parts, a developer
role); `Habits` says what this one takes, and the turns are written accordingly. Knows no tokens.
Used by template.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from serve.errors import Unsupported
from serve.values import ImagePart, Message, TextPart, Tool, ToolCallPart

Turn = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Habits:
    """What a chat template takes, found out by rendering with it."""

    system: bool = True
    developer: bool = False
    parts: bool = False
    images: bool = False


@dataclass(frozen=True, slots=True)
class Manner:
    """How old tool calls are written. Arguments are a mapping where they are JSON; else "as it is"
    the text the model wrote, wrapped in a mapping, or (with "text") always text."""

    arguments: Literal["as it is", "wrapped", "text"] = "as it is"
    short_ids: bool = False
    one_by_one: bool = False


# What templates have been seen to refuse: ids that are not nine characters, arguments that are no
# mapping, arguments that are one, two calls in a turn.
MANNERS = (
    Manner(),
    Manner(short_ids=True),
    Manner("wrapped", short_ids=True),
    Manner("text"),
    Manner("wrapped", short_ids=True, one_by_one=True),
)


def turns(messages: Sequence[Message], habits: Habits, manner: Manner = MANNERS[0]) -> list[Turn]:
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    messages = _joined(_with_system(messages, habits))
    if manner.one_by_one:
        messages = _one_by_one(messages)
    return [_turn(message, habits, names, manner) for message in messages]


def _joined(messages: Sequence[Message]) -> list[Message]:
    """One assistant turn that came in pieces (its reasoning, each call) as one message again."""
    found: list[Message] = []
    for message in messages:
        before = found[-1] if found else None
        if (
            before is not None
            and before.role == message.role == "assistant"
            and not (before.text and message.text)
        ):
            found[-1] = replace(before, parts=(*before.parts, *message.parts))
        else:
            found.append(message)
    return found


def _one_by_one(messages: Sequence[Message]) -> list[Message]:
    """A turn of several calls as several turns, each followed by its result."""
    results = {m.tool_call_id: m for m in messages if m.role == "tool"}
    found: list[Message] = []
    for message in messages:
        calls = message.tool_calls
        if len(calls) > 1:
            rest = tuple(part for part in message.parts if not isinstance(part, ToolCallPart))
            for i, call in enumerate(calls):
                found.append(replace(message, parts=(*(rest if i == 0 else ()), call)))
                found += [results.pop(call.id)] if call.id in results else []
        elif message.role != "tool" or results.pop(message.tool_call_id, None) is not None:
            found.append(message)
    return found


def _with_system(messages: Sequence[Message], habits: Habits) -> list[Message]:
    """Leading instructions joined to one system turn, or put before the first user turn of a
    template that has none."""
    roles = ("system",) if habits.developer else ("system", "developer")
    lead = 0
    while lead < len(messages) and messages[lead].role in roles:
        lead += 1
    rest = [_as_system(message, habits) for message in messages[lead:]]
    if lead == 0:
        return rest
    parts = messages[0].parts
    if lead > 1:
        parts = (TextPart("\n\n".join(message.text for message in messages[:lead])),)
    if habits.system:
        return [Message("system", parts), *rest]
    instructions = TextPart("".join(p.text for p in parts if isinstance(p, TextPart)) + "\n\n")
    for at, message in enumerate(rest):
        if message.role == "user":
            joined = Message("user", (instructions, *message.parts), message.name)
            return [*rest[:at], joined, *rest[at + 1 :]]
    return [Message("user", (TextPart(instructions.text.strip()),)), *rest]


def _as_system(message: Message, habits: Habits) -> Message:
    if message.role == "developer" and not habits.developer:
        return Message("system", message.parts, message.name)
    return message


def _turn(message: Message, habits: Habits, names: dict[str, str], manner: Manner) -> Turn:
    turn: Turn = {"role": message.role, "content": _content(message, habits)}
    if message.reasoning:
        turn["reasoning_content"] = message.reasoning
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": _id(call.id, manner),
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments, manner)},
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        turn["tool_call_id"] = _id(message.tool_call_id or "", manner)
        turn["name"] = message.name or names.get(message.tool_call_id or "", "")
    return turn


def _content(message: Message, habits: Habits) -> str | list[Turn]:
    if message.images and not habits.images:
        raise Unsupported(
            "This model reads text only: leave the images out, or ask a model that sees.",
            param=message.images[0].where or "messages",
        )
    if habits.parts or message.images:
        return [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
            for part in message.parts
            if isinstance(part, TextPart | ImagePart)
        ]
    return message.text


def _id(written: str, manner: Manner) -> str:
    return hashlib.sha256(written.encode()).hexdigest()[:9] if manner.short_ids else written


def _arguments(written: str, manner: Manner) -> Any:
    """Templates write a mapping out themselves; what is no mapping stays as the model wrote it."""
    if manner.arguments == "text":
        return written
    try:
        arguments = json.loads(written) if written.strip() else {}
    except (ValueError, RecursionError):
        arguments = None
    if isinstance(arguments, dict):
        return arguments
    return {"arguments": written} if manner.arguments == "wrapped" else written


def tool_turns(tools: Sequence[Tool]) -> list[Turn]:
    """Declared tools in the nested shape that templates expect."""
    return [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": dict(tool.parameters or {"type": "object", "properties": {}}),
            },
        }
        for tool in tools
    ]
