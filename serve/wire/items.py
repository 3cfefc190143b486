"""Responses input items as Messages.

Neighbouring items of the assistant's side (reasoning, a message, calls) are one turn, as the model
wrote them. Items that only a hosted service makes are left out and reported as ignored: history is
data. Used by responses.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

from serve.errors import InvalidRequest, Unsupported
from serve.values import Message, Part, ReasoningPart, Role, TextPart, ToolCallPart
from serve.wire.body import Body
from serve.wire.messages import read_arguments
from serve.wire.parts import read_content
from serve.wire.tools import Declared

OpenSealed = Callable[[str], str | None]

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
}
_CALLS = ("function_call", "custom_tool_call")
_RESULTS = ("function_call_output", "custom_tool_call_output")


class ItemReader:
    """`open_sealed` opens reasoning that was handed out encrypted; None when it cannot."""

    def __init__(self, declared: Declared, open_sealed: OpenSealed) -> None:
        self._declared = declared
        self._open_sealed = open_sealed
        self._messages: list[Message] = []
        self._turn: list[Part] = []

    def read(self, items: Iterable[Body]) -> tuple[Message, ...]:
        for item in items:
            self._item(item)
        self._end_turn()
        return tuple(self._messages)

    def _item(self, item: Body) -> None:
        kind = item.text("type") or ("message" if item.has("role") else "")
        if kind == "message":
            self._message(item)
        elif kind == "reasoning":
            self._reasoning(item)
        elif kind in _CALLS:
            self._call(item)
        elif kind in _RESULTS:
            self._end_turn()
            call_id = item.required_text("call_id")
            self._messages.append(Message("tool", _result(item), None, call_id))
        elif kind == "item_reference":
            raise Unsupported(
                f"'{item.path}': items cannot be referred to by id; send the item itself, or use "
                "previous_response_id.",
                param=item.path,
            )
        elif not kind:
            raise InvalidRequest(f"'{item.at('type')}' is required.", param=item.at("type"))
        else:
            item.ignore(f"type={kind}")

    def _message(self, item: Body) -> None:
        role = item.one_of("role", tuple(_ROLES))
        if role is None:
            raise item.wrong("role", "one of " + ", ".join(_ROLES))
        parts = read_content(item, "content")
        if role != "assistant":
            self._end_turn()
            self._messages.append(Message(_ROLES[role], parts or (TextPart(""),)))
            return
        if any(isinstance(part, TextPart | ToolCallPart) for part in self._turn):
            self._end_turn()
        self._turn += parts

    def _reasoning(self, item: Body) -> None:
        if any(not isinstance(part, ReasoningPart) for part in self._turn):
            self._end_turn()
        parts = read_content(item, "content") or read_content(item, "summary")
        text = "".join(part.text for part in parts if isinstance(part, TextPart | ReasoningPart))
        sealed = item.text("encrypted_content")
        if not text and sealed:
            opened = self._open_sealed(sealed)
            if opened is None:
                item.ignore("encrypted_content")
            text = opened or ""
        if text:
            self._turn.append(ReasoningPart(text))

    def _call(self, item: Body) -> None:
        name = self._declared.flat_name(item.required_text("name"), item.text("namespace"))
        call_id = item.text("call_id") or item.text("id") or f"call_{len(self._turn)}"
        self._turn.append(ToolCallPart(call_id, name, read_arguments(item)))

    def _end_turn(self) -> None:
        if self._turn:
            self._messages.append(Message("assistant", tuple(self._turn)))
            self._turn = []


def _result(item: Body) -> tuple[Part, ...]:
    """A string or parts; some clients send the tool's object as it is."""
    output = item.get("output")
    if isinstance(output, dict):
        return (TextPart(json.dumps(output, ensure_ascii=False)),)
    return read_content(item, "output")
