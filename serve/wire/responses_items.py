"""The three kinds of output item of a response while they are open.

Each knows its JSON at any moment and the events that are its own; the builder knows when. Used by
responses_answer.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from serve.wire.tools import Origin


class OpenItem:
    """`part_kind` is the type of the item's one content part (None: it has none), `delta_event`
    what its growth is called (None: it is told only when it is done)."""

    part_kind: str | None = None
    delta_event: str | None = None

    def __init__(self, item_id: str) -> None:
        self.id = item_id
        self.output_index = 0
        self.texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def part(self, is_done: bool) -> dict[str, Any]:
        return {"type": self.part_kind, "text": self.text if is_done else ""}

    def done_events(self) -> list[tuple[str, dict[str, Any]]]:
        raise NotImplementedError

    def body(self, status: str) -> dict[str, Any]:
        raise NotImplementedError


class ReasoningItem(OpenItem):
    part_kind = "reasoning_text"
    delta_event = "response.reasoning_text.delta"

    def __init__(self, item_id: str, seal: Callable[[str], str] | None) -> None:
        super().__init__(item_id)
        self._seal = seal

    def done_events(self) -> list[tuple[str, dict[str, Any]]]:
        return [("response.reasoning_text.done", {"text": self.text})]

    def body(self, status: str) -> dict[str, Any]:
        is_open = status == "in_progress"
        found: dict[str, Any] = {
            "id": self.id,
            "type": "reasoning",
            "summary": [],
            "content": [] if is_open else [self.part(is_done=True)],
            "status": status,
        }
        if self._seal is not None and not is_open:
            found["encrypted_content"] = self._seal(self.text)
        return found


class MessageItem(OpenItem):
    part_kind = "output_text"
    delta_event = "response.output_text.delta"

    def __init__(self, item_id: str) -> None:
        super().__init__(item_id)
        self.scores: list[dict[str, Any]] = []

    def part(self, is_done: bool) -> dict[str, Any]:
        scores = self.scores if is_done else []
        return {**super().part(is_done), "annotations": [], "logprobs": scores}

    def done_events(self) -> list[tuple[str, dict[str, Any]]]:
        return [("response.output_text.done", {"text": self.text, "logprobs": self.scores})]

    def body(self, status: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if status == "in_progress" else [self.part(is_done=True)],
        }


class CallItem(OpenItem):
    """A function call, or a call of a custom tool, whose input stands in an argument and can be
    told only when all of it is there."""

    def __init__(self, item_id: str, call: int, call_id: str, origin: Origin) -> None:
        super().__init__(item_id)
        self.call = call
        self._call_id = call_id
        self._origin = origin
        if origin.kind == "function":
            self.delta_event = "response.function_call_arguments.delta"

    def done_events(self) -> list[tuple[str, dict[str, Any]]]:
        if self._origin.kind == "function":
            return [("response.function_call_arguments.done", {"arguments": self.text})]
        kind = "response.custom_tool_call_input"
        return [
            (f"{kind}.delta", {"delta": self._input()}),
            (f"{kind}.done", {"input": self._input()}),
        ]

    def _input(self) -> str:
        """What the model wrote, if it is not the one-argument object it was asked for."""
        try:
            return str(json.loads(self.text)["input"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return self.text

    def body(self, status: str) -> dict[str, Any]:
        found = {"id": self.id, "call_id": self._call_id, "name": self._origin.name}
        if self._origin.namespace is not None:
            found["namespace"] = self._origin.namespace
        if self._origin.kind == "custom":
            is_open = status == "in_progress"
            return {**found, "type": "custom_tool_call", "input": "" if is_open else self._input()}
        return {**found, "type": "function_call", "status": status, "arguments": self.text}
