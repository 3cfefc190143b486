"""/v1/chat/completions, the answering half, pure: events to chunk frames, events to a completion.

A chunk's fixed part is rendered once for each answer, so a token costs one small JSON string. The
whole answer is a fold over the same events as the stream. Used by openai_compat.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.errors import ServeError, Unavailable
from serve.values import (
    Accepted,
    Cancelled,
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStarted,
    Usage,
)
from serve.wire.envelope import encode, envelope, frame

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Head:
    """What every part of one answer repeats. `created` is in seconds since 1970."""

    id: str
    model: str
    fingerprint: str
    created: int


def cut_short(event: Failed | Cancelled) -> ServeError:
    """The error a client sees for an end that is none. It did not cancel, so the server did."""
    if isinstance(event, Failed):
        return event.error
    return Unavailable("The server is shutting down; send the request again.", retry_after=5)


class ChunkWriter:
    """Events in, server-sent frames out."""

    def __init__(self, head: Head, choices: int = 1, include_usage: bool = False) -> None:
        fixed = {
            "id": head.id,
            "object": "chat.completion.chunk",
            "created": head.created,
            "model": head.model,
            "system_fingerprint": head.fingerprint,
        }
        self._start = f"data: {encode(fixed)[:-1]},"
        self._end = ',"usage":null}\n\n' if include_usage else "}\n\n"
        self._choices = choices
        self._include_usage = include_usage

    def event(self, event: Event) -> str:
        match event:
            case TextDelta():
                scores = encode(logprobs_json(event.logprobs)) if event.logprobs else "null"
                return self._chunk(event.choice, f'{{"content":{encode(event.text)}}}', scores)
            case ReasoningDelta():
                text = encode(event.text)
                delta = f'{{"reasoning":{text},"reasoning_content":{text}}}'
                return self._chunk(event.choice, delta)
            case ToolCallDelta():
                call = {"index": event.call, "function": {"arguments": event.arguments}}
                return self._chunk(event.choice, encode({"tool_calls": [call]}))
            case ToolCallStarted():
                return self._chunk(event.choice, encode({"tool_calls": [_opening(event)]}))
            case ChoiceFinished():
                return self._chunk(event.choice, "{}", reason=f'"{event.reason}"')
            case Accepted():
                return "".join(
                    self._chunk(i, '{"role":"assistant","content":""}')
                    for i in range(self._choices)
                )
            case Finished():
                return self._usage(event.usage) + DONE
            case Failed() | Cancelled():
                return frame(envelope(cut_short(event))) + DONE
        return ""

    def _chunk(self, choice: int, delta: str, scores: str = "null", reason: str = "null") -> str:
        return (
            f'{self._start}"choices":[{{"index":{choice},"delta":{delta},'
            f'"logprobs":{scores},"finish_reason":{reason}}}]{self._end}'
        )

    def _usage(self, usage: Usage) -> str:
        if not self._include_usage:
            return ""
        return f'{self._start}"choices":[],"usage":{encode(usage_json(usage))}}}\n\n'


def _opening(event: ToolCallStarted) -> dict[str, Any]:
    return {
        "index": event.call,
        "id": event.id,
        "type": "function",
        "function": {"name": event.name, "arguments": ""},
    }


@dataclass(slots=True)
class _Call:
    id: str
    name: str
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[_Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: str = "stop"


class Fold:
    """Events in; at the end one chat completion out."""

    def __init__(
        self, head: Head, choices: int = 1, metadata: Mapping[str, str] | None = None
    ) -> None:
        self._head = head
        self._choices = [_Choice() for _ in range(choices)]
        self._metadata = metadata
        self._usage = Usage()
        self._error: ServeError | None = None

    def event(self, event: Event) -> None:
        match event:
            case TextDelta():
                self._choices[event.choice].text.append(event.text)
                self._choices[event.choice].logprobs.extend(event.logprobs)
            case ReasoningDelta():
                self._choices[event.choice].reasoning.append(event.text)
            case ToolCallStarted():
                self._choices[event.choice].calls.append(_Call(event.id, event.name))
            case ToolCallDelta():
                self._choices[event.choice].calls[event.call].arguments.append(event.arguments)
            case ChoiceFinished():
                self._choices[event.choice].reason = event.reason
            case Finished():
                self._usage = event.usage
            case Failed() | Cancelled():
                self._error = cut_short(event)

    def check(self) -> None:
        """Raises the error of an answer that failed."""
        if self._error is not None:
            raise self._error

    def body(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "id": self._head.id,
            "object": "chat.completion",
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": self._head.fingerprint,
            "service_tier": "default",
            "choices": [_choice_json(i, choice) for i, choice in enumerate(self._choices)],
            "usage": usage_json(self._usage),
        }
        if self._metadata is not None:
            found["metadata"] = self._metadata
        return found


def _choice_json(index: int, choice: _Choice) -> dict[str, Any]:
    text = "".join(choice.text)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text if text or not choice.calls else None,
        "refusal": None,
        "annotations": [],
    }
    if choice.reasoning:
        message["reasoning"] = message["reasoning_content"] = "".join(choice.reasoning)
    if choice.calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": "".join(call.arguments)},
            }
            for call in choice.calls
        ]
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs_json(choice.logprobs) if choice.logprobs else None,
        "finish_reason": choice.reason,
    }


def usage_json(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def logprobs_json(scores: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {"content": [score_json(score) for score in scores], "refusal": None}


def score_json(score: TokenLogprob, with_top: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {
        "token": score.token,
        "logprob": score.logprob,
        "bytes": list(score.data),
    }
    if with_top:
        found["top_logprobs"] = [score_json(other, with_top=False) for other in score.top]
    return found
