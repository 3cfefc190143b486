"""/v1/completions, pure: a raw prompt (or several) to TextRequests, events to chunks or one answer.

Choices of the second prompt follow those of the first. Knows no HTTP and no tokens. Used by
openai_compat.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.errors import InvalidRequest, ServeError, Unsupported
from serve.values import (
    Accepted,
    Cancelled,
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    TextDelta,
    TextRequest,
    TokenLogprob,
    Usage,
)
from serve.wire import bounds, fields
from serve.wire.body import Body
from serve.wire.chat import read_stream
from serve.wire.chat_answer import DONE, Head, cut_short, usage_json
from serve.wire.envelope import encode, envelope, frame
from serve.wire.fields_completions import COMPLETIONS
from serve.wire.sampling import MOST_TOKENS, read_n, read_sampling, read_top_logprobs

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True, slots=True)
class CompletionsCall:
    """One TextRequest for each prompt. `echoes` are what each prompt's choices begin with."""

    requests: tuple[TextRequest, ...]
    stream: bool = False
    include_usage: bool = False
    echoes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return self.requests[0].sampling.n

    @property
    def starts(self) -> tuple[str, ...]:
        """What each choice begins with."""
        echoes = self.echoes or ("",) * len(self.requests)
        return tuple(echo for echo in echoes for _ in range(self.n))


def read(body: Body, tenant: str = "", request_id: str = "") -> CompletionsCall:
    """Raises InvalidRequest or Unsupported naming the field."""
    fields.check(body, COMPLETIONS)
    prompts = _read_prompts(body)
    max_tokens = body.whole("max_tokens", 1, MOST_TOKENS) or DEFAULT_MAX_TOKENS
    sampling = read_sampling(
        body, max_tokens=max_tokens, logprobs=read_top_logprobs(body, "logprobs"), n=read_n(body)
    )
    bounds.SEQUENCES.check(len(prompts) * sampling.n, "prompt")
    echoes = _read_echoes(body, prompts)
    model = body.text("model", 256) or "default"
    requests = tuple(TextRequest(prompt, sampling, model, tenant, request_id) for prompt in prompts)
    stream, include_usage = read_stream(body)
    return CompletionsCall(requests, stream, include_usage, echoes, tuple(body.ignored))


def _read_prompts(body: Body) -> list[str | tuple[int, ...]]:
    value = body.get("prompt")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise body.wrong("prompt", "a string, an array of strings, or token ids")
    if all(type(item) is int for item in value):
        return [_ids(body, value)]
    bounds.PROMPTS.check(len(value), "prompt")
    if all(isinstance(item, str) for item in value):
        return list(value)
    if all(isinstance(item, list) and item for item in value):
        return [_ids(body, item) for item in value]
    raise body.wrong("prompt", "a string, an array of strings, or token ids")


def _ids(body: Body, value: list[Any]) -> tuple[int, ...]:
    if not all(type(item) is int and 0 <= item < 2**31 for item in value):
        raise body.wrong("prompt", "made of token ids (whole numbers from 0)")
    return tuple(value)


def _read_echoes(body: Body, prompts: Sequence[str | tuple[int, ...]]) -> tuple[str, ...]:
    if not body.flag("echo"):
        return ()
    if body.has("logprobs"):
        raise Unsupported(
            "'echo' with 'logprobs' is not supported: log probabilities are of answers only.",
            param="echo",
        )
    texts = tuple(prompt for prompt in prompts if isinstance(prompt, str))
    if len(texts) < len(prompts):
        raise InvalidRequest("'echo' needs a text prompt, not token ids.", param="echo")
    return texts


class CompletionWriter:
    """Events in, server-sent frames out."""

    def __init__(self, head: Head, starts: Sequence[str], include_usage: bool) -> None:
        self._start = f"data: {encode(_fixed(head))[:-1]},"
        self._end = ',"usage":null}\n\n' if include_usage else "}\n\n"
        self._include_usage = include_usage
        self._starts = starts
        self._offsets = [len(start) for start in starts]

    def event(self, event: Event) -> str:
        match event:
            case Accepted():
                return "".join(self._chunk(i, text) for i, text in enumerate(self._starts) if text)
            case TextDelta():
                scores = None
                if event.logprobs:
                    scores = _logprobs_json(event.logprobs, self._offsets[event.choice])
                self._offsets[event.choice] += sum(len(s.token) for s in event.logprobs)
                return self._chunk(event.choice, event.text, scores)
            case ChoiceFinished():
                return self._chunk(event.choice, "", None, event.reason)
            case Finished():
                return self._usage(event.usage) + DONE
            case Failed() | Cancelled():
                return frame(envelope(cut_short(event))) + DONE
        return ""

    def _chunk(self, index: int, text: str, scores: Any = None, reason: str | None = None) -> str:
        choice = {"index": index, "text": text, "logprobs": scores, "finish_reason": reason}
        return f'{self._start}"choices":[{encode(choice)}]{self._end}'

    def _usage(self, usage: Usage) -> str:
        if not self._include_usage:
            return ""
        return f'{self._start}"choices":[],"usage":{encode(usage_json(usage))}}}\n\n'


def _fixed(head: Head) -> dict[str, Any]:
    return {
        "id": head.id,
        "object": "text_completion",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
    }


@dataclass(slots=True)
class _Choice:
    start: str
    texts: list[str] = field(default_factory=list)
    scores: list[TokenLogprob] = field(default_factory=list)
    reason: str = "stop"

    def body(self, index: int) -> dict[str, Any]:
        scores = _logprobs_json(self.scores, len(self.start)) if self.scores else None
        text = self.start + "".join(self.texts)
        return {"index": index, "text": text, "logprobs": scores, "finish_reason": self.reason}


class CompletionFold:
    """Events in; at the end one completion out."""

    def __init__(self, head: Head, starts: Sequence[str]) -> None:
        self._head = head
        self._choices = [_Choice(start) for start in starts]
        self._usage = Usage()
        self._error: ServeError | None = None

    def event(self, event: Event) -> None:
        match event:
            case TextDelta():
                self._choices[event.choice].texts.append(event.text)
                self._choices[event.choice].scores.extend(event.logprobs)
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
        choices = [choice.body(i) for i, choice in enumerate(self._choices)]
        return {**_fixed(self._head), "choices": choices, "usage": usage_json(self._usage)}


def _logprobs_json(scores: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """The old shape: parallel arrays. Offsets count characters from the start of the text."""
    offsets: list[int] = []
    for score in scores:
        offsets.append(offset)
        offset += len(score.token)
    return {
        "tokens": [score.token for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [{other.token: other.logprob for other in score.top} for score in scores],
        "text_offset": offsets,
    }
