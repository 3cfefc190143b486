"""One answer in the making: events in, the whole answer so far out, as plain JSON for the browser.

Knows what happened (phase, text, reasoning, calls, numbers), not how it looks: every word a reader
sees is chosen in the browser, in the reader's language, from the codes given here. Used by
chat.py for the page and by endpoints.py for gradio_client.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from serve.errors import ServeError
from serve.values import (
    Accepted,
    Cancelled,
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    FinishReason,
    Queued,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStarted,
)

Phase = Literal[
    "waiting", "queued", "reading", "thinking", "answering", "calling", "done", "stopped", "failed"
]
ENDED: tuple[Phase, ...] = ("done", "stopped", "failed")


class Answer:
    """Folds the events of one choice. `text` may start with what an earlier part already said."""

    def __init__(
        self, turn: str = "", text: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.turn = turn
        self.phase: Phase = "reading"
        self.notes: list[dict[str, Any]] = []
        self.files: list[dict[str, Any]] = []
        self._text = [text] if text else []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._queue: dict[str, Any] = {}
        self._stats: dict[str, Any] = {}
        self.failure: ServeError | None = None
        self.finish_reason: FinishReason | None = None
        self._clock = clock
        self._thinking_since: float | None = None
        self._thought_seconds: float | None = None
        self._count = 0

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [
            {"id": c["id"], "name": c["name"], "arguments": "".join(c["parts"])}
            for c in self._calls
        ]

    @property
    def has_ended(self) -> bool:
        return self.phase in ENDED

    def take(self, event: Event) -> None:
        match event:
            case Accepted():
                self._stats["prompt_tokens"] = event.prompt_tokens
            case Queued():
                self.phase = "queued" if event.ahead > 0 else "reading"
                self._queue = {"ahead": event.ahead, "wait_seconds": event.wait_seconds}
            case ChoiceFinished():
                self.finish_reason = event.reason
            case Finished():
                self._finish(event)
            case Cancelled():
                self.stop()
            case Failed():
                self.fail(event.error)
            case _:
                self._take_content(event)

    def _take_content(
        self, event: TextDelta | ReasoningDelta | ToolCallStarted | ToolCallDelta
    ) -> None:
        self._count += 1
        if isinstance(event, ReasoningDelta):
            self._thinking_since = self._thinking_since or self._clock()
            self._thought_seconds = None
            self._reasoning.append(event.text)
            self.phase = "thinking"
            return
        self._end_thought()
        if isinstance(event, TextDelta):
            self._text.append(event.text)
            self.phase = "answering"
        elif isinstance(event, ToolCallStarted):
            self._calls.append({"id": event.id, "name": event.name, "parts": []})
            self.phase = "calling"
        else:
            self._calls[event.call]["parts"].append(event.arguments)

    def _end_thought(self) -> None:
        if self._thinking_since is not None and self._thought_seconds is None:
            self._thought_seconds = self._clock() - self._thinking_since

    def _finish(self, event: Finished) -> None:
        self._end_thought()
        self.phase = "done"
        usage, timing = event.usage, event.timing
        decode_seconds = timing.total_seconds - timing.first_token_seconds
        rate = (usage.completion_tokens - 1) / decode_seconds if decode_seconds > 0 else None
        self._stats |= {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
            "first_token_seconds": timing.first_token_seconds,
            "tokens_per_second": rate if usage.completion_tokens > 1 else None,
        }

    def stop(self) -> None:
        self._end_thought()
        self.phase = "stopped"

    def fail(self, error: ServeError) -> None:
        self._end_thought()
        self.phase = "failed"
        self.failure = error

    def begin_again(self) -> None:
        """The model was not there yet: forget that this failed."""
        self.failure = None
        self.phase = "waiting"

    def snapshot(self) -> dict[str, Any]:
        """Everything so far. Strings only grow, so Gradio sends what was added, not the whole."""
        return {
            "turn": self.turn,
            "phase": self.phase,
            "text": self.text,
            "reasoning": self.reasoning,
            "calls": self.calls,
            "thought_seconds": self._thought_seconds,
            "queue": dict(self._queue),
            "stats": dict(self._stats),
            "cut": self.finish_reason == "length",
            "notes": list(self.notes),
            "files": list(self.files),
            "error": _public(self.failure),
        }


def _public(error: ServeError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {"code": error.code, "message": error.message, "retry_after": error.retry_after}
