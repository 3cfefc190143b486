"""/v1/responses, the answering half, pure: events to a response, and to the stream of how it grows.

One builder for both: it makes every frame in order, with one counter for their numbers, and holds
the response as it stands. An item is reasoning, a message or a call; one opens when events change
their kind, and everything it was opened with is closed again. Used by openai_compat.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from serve.errors import RateLimited, ServeError
from serve.values import (
    Accepted,
    Cancelled,
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStarted,
    Usage,
)
from serve.wire.chat_answer import Head, cut_short, score_json
from serve.wire.envelope import frame
from serve.wire.responses_items import CallItem, MessageItem, OpenItem, ReasoningItem
from serve.wire.tools import Declared


class ResponseBuilder:
    """`event` takes one event and returns its frames; `body` is the response as it stands.

    `seal` encrypts reasoning for the client to carry (None: not asked for). `on_end` gets the
    final body before the last frame is written, and says whether it is kept.
    """

    def __init__(
        self,
        head: Head,
        echo: Mapping[str, Any],
        declared: Declared,
        seal: Callable[[str], str] | None = None,
        on_end: Callable[[dict[str, Any]], bool] | None = None,
    ) -> None:
        self._head = head
        self._echo = echo
        self._declared = declared
        self._seal = seal
        self._on_end = on_end
        self._next = 0
        self._status = "in_progress"
        self._has_length_end = False
        self._done: list[dict[str, Any]] = []
        self._open: list[OpenItem] = []
        self._items = 0
        self._usage: Usage | None = None
        self._error: ServeError | None = None
        self._completed_at: int | None = None
        self.is_cancelled_by_client = False

    # -- one method per event ----------------------------------------------------------------------

    def event(self, event: Event) -> str:
        match event:
            case Accepted():
                return self._response("response.created") + self._response("response.in_progress")
            case ReasoningDelta():
                return self._reasoning(event)
            case TextDelta():
                return self._text(event)
            case ToolCallStarted():
                return self._call_started(event)
            case ToolCallDelta():
                return self._call_delta(event)
            case ChoiceFinished():
                return self._choice_finished(event)
            case Finished() | Failed() | Cancelled():
                return self._end(event)
        return ""

    def _reasoning(self, event: ReasoningDelta) -> str:
        frames = ""
        if not isinstance(self._current, ReasoningItem):
            frames = self._close_open() + self._begin(ReasoningItem(self._id("rs"), self._seal))
        return frames + self._grow(self._open[-1], event.text)

    def _text(self, event: TextDelta) -> str:
        frames = ""
        if not isinstance(self._current, MessageItem):
            frames = self._close_open() + self._begin(MessageItem(self._id("msg")))
        item = self._open[-1]
        assert isinstance(item, MessageItem)
        scores = [score_json(score) for score in event.logprobs]
        item.scores += scores
        return frames + self._grow(item, event.text, {"logprobs": scores})

    def _call_started(self, event: ToolCallStarted) -> str:
        origin = self._declared.origin(event.name)
        prefix = "fc" if origin.kind == "function" else "ctc"
        item = CallItem(self._id(prefix), event.call, event.id, origin)
        frames = "" if isinstance(self._current, CallItem) else self._close_open()
        return frames + self._begin(item)

    def _call_delta(self, event: ToolCallDelta) -> str:
        for item in self._open:
            if isinstance(item, CallItem) and item.call == event.call:
                return self._grow(item, event.arguments)
        raise AssertionError(f"arguments for call {event.call}, which is not open")

    def _choice_finished(self, event: ChoiceFinished) -> str:
        self._has_length_end = event.reason == "length"
        return self._close_open("incomplete" if self._has_length_end else "completed")

    def _end(self, event: Finished | Failed | Cancelled) -> str:
        frames = self._close_open("completed" if isinstance(event, Finished) else "incomplete")
        self._completed_at = int(time.time())
        if isinstance(event, Failed) or (
            isinstance(event, Cancelled) and not self.is_cancelled_by_client
        ):
            self._status, self._error = "failed", cut_short(event)
        else:
            self._usage = event.usage
            self._status = "incomplete" if self._has_length_end else "completed"
            if isinstance(event, Cancelled):
                self._status = "cancelled"
        if self._on_end is not None and not self._on_end(self.body()):
            self._echo = {**self._echo, "store": False}
        kind = "incomplete" if self._status == "cancelled" else self._status
        return frames + self._response(f"response.{kind}")

    @property
    def has_ended(self) -> bool:
        return self._status != "in_progress"

    def check(self) -> None:
        """Raises the error of an answer that failed, for a caller that can still say so."""
        if self._error is not None:
            raise self._error

    # -- items -------------------------------------------------------------------------------------

    @property
    def _current(self) -> OpenItem | None:
        return self._open[-1] if self._open else None

    def _id(self, prefix: str) -> str:
        return f"{prefix}_{self._head.id.partition('_')[2]}{self._items:02d}"

    def _begin(self, item: OpenItem) -> str:
        item.output_index = self._items
        self._items += 1
        self._open.append(item)
        added = {"output_index": item.output_index, "item": item.body("in_progress")}
        frames = self._frame("response.output_item.added", added)
        if item.part_kind is not None:
            frames += self._part(item, "response.content_part.added", item.part(is_done=False))
        return frames

    def _grow(self, item: OpenItem, text: str, extra: Mapping[str, Any] | None = None) -> str:
        item.texts.append(text)
        if item.delta_event is None:
            return ""
        return self._part(item, item.delta_event, None, {"delta": text, **(extra or {})})

    def _close_open(self, status: str = "completed") -> str:
        frames = ""
        for item in self._open:
            for name, fields in item.done_events():
                frames += self._part(item, name, None, fields)
            if item.part_kind is not None:
                frames += self._part(item, "response.content_part.done", item.part(is_done=True))
            body = item.body(status)
            self._done.append(body)
            done = {"output_index": item.output_index, "item": body}
            frames += self._frame("response.output_item.done", done)
        self._open = []
        return frames

    def _part(
        self,
        item: OpenItem,
        name: str,
        part: Mapping[str, Any] | None,
        fields: Mapping[str, Any] | None = None,
    ) -> str:
        told: dict[str, Any] = {"item_id": item.id, "output_index": item.output_index}
        if item.part_kind is not None:
            told["content_index"] = 0
        if part is not None:
            told["part"] = part
        return self._frame(name, told | dict(fields or {}))

    # -- frames and the response -------------------------------------------------------------------

    def _frame(self, name: str, fields: Mapping[str, Any]) -> str:
        number = self._next
        self._next += 1
        return frame({"type": name, "sequence_number": number, **fields}, name)

    def _response(self, name: str) -> str:
        return self._frame(name, {"response": self.body()})

    def body(self) -> dict[str, Any]:
        is_cut = self._status == "incomplete"
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "completed_at": self._completed_at if self._status == "completed" else None,
            "status": self._status,
            "error": None if self._error is None else error_json(self._error),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self._head.model,
            "output": list(self._done),
            "usage": None if self._usage is None else usage_json(self._usage),
            **self._echo,
        }


def error_json(error: ServeError) -> dict[str, Any]:
    code = "rate_limit_exceeded" if isinstance(error, RateLimited) else "server_error"
    return {"code": code, "message": error.message, "type": error.type, "param": error.param}


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
