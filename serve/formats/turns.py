"""Our messages as the plain dictionaries that Hugging Face chat templates read.

What a template can take differs (a system turn or none, strings or lists of parts, a developer
role); `Habits` says what this one takes, and the turns are written accordingly. Knows no tokens.
Used by template.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.errors import Unsupported
from serve.values import ImagePart, Message, TextPart, Tool

Turn = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Habits:
    """What a chat template takes, found out by rendering with it."""

    system: bool = True
    developer: bool = False
    parts: bool = False
    images: bool = False


def turns(
    messages: Sequence[Message], habits: Habits, *, wrap_arguments: bool = False
) -> list[Turn]:
    """`wrap_arguments`: arguments that are no JSON object are given as one, for templates that walk
    through them."""
    names = {call.id: call.name for message in messages for call in message.tool_calls}
    return [
        _turn(message, habits, names, wrap_arguments) for message in _with_system(messages, habits)
    ]


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


def _turn(message: Message, habits: Habits, names: dict[str, str], wrap: bool) -> Turn:
    turn: Turn = {"role": message.role, "content": _content(message, habits)}
    if message.reasoning:
        turn["reasoning_content"] = message.reasoning
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments, wrap)},
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        turn["tool_call_id"] = message.tool_call_id or ""
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


def _arguments(written: str, wrap: bool) -> Any:
    """Templates write a mapping out themselves; what is no mapping stays as the model wrote it."""
    try:
        arguments = json.loads(written) if written.strip() else {}
    except (ValueError, RecursionError):
        arguments = None
    if isinstance(arguments, dict):
        return arguments
    return {"arguments": written} if wrap else written


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
