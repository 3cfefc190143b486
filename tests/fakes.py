"""Small stand-ins: a prompt format whose ids are bytes, and a service around a ScriptedEngine."""

from __future__ import annotations

from collections.abc import Sequence

from serve.engine.face import Engine, Prompt, TokenScore
from serve.formats.base import Rendered
from serve.service import ServedModel, Service
from serve.values import (
    Capabilities,
    ChatRequest,
    ContentEvent,
    FinishReason,
    ModelCard,
    ReasoningDelta,
    Sampling,
    TextDelta,
    TextRequest,
    TokenLogprob,
    ToolCallDelta,
    ToolCallStarted,
)

END = 0  # the id that ends an answer
THINK, SAY, CALL = 1, 2, 3  # what follows is reasoning, text, a call written name(arguments


class ByteParser:
    """Ids are UTF-8 bytes; THINK, SAY and CALL switch what the bytes are."""

    def __init__(self, stop: Sequence[str] = (), choice: int = 0) -> None:
        self.reasoning_tokens = 0
        self.is_stopped = False
        self._stop = stop
        self._choice = choice
        self._mode = SAY
        self._said = ""
        self._calls = 0
        self._name = ""

    def feed(self, ids: Sequence[int], scores: Sequence[TokenScore] = ()) -> list[ContentEvent]:
        return [
            event
            for i, token in enumerate(ids)
            for event in self._one(token, scores[i] if i < len(scores) else None)
        ]

    def _one(self, token: int, score: TokenScore | None) -> list[ContentEvent]:
        if token == END:
            return []
        if token in (THINK, SAY, CALL):
            self._mode = token
            self._name = ""
            self._calls += token == CALL
            return []
        text = chr(token)
        if self._mode == THINK:
            self.reasoning_tokens += 1
            return [ReasoningDelta(text, self._choice)]
        if self._mode == CALL:
            return self._call(text)
        self._said += text
        if any(self._said.endswith(stop) for stop in self._stop):
            self.is_stopped = True
            return []
        return [TextDelta(text, self._choice, () if score is None else (scored(token, score),))]

    def _call(self, text: str) -> list[ContentEvent]:
        index = self._calls - 1
        if "(" in self._name:
            return [ToolCallDelta(index, text, self._choice)]
        self._name += text
        if text != "(":
            return []
        return [ToolCallStarted(index, f"call_{index}", self._name[:-1], self._choice)]

    def finish(self) -> list[ContentEvent]:
        return []

    def reason(self, ended: FinishReason) -> FinishReason:
        return "tool_calls" if ended == "stop" and self._calls else ended


def scored(token: int, score: TokenScore) -> TokenLogprob:
    top = tuple(TokenLogprob(chr(i), bytes([i % 256]), p) for i, p in score.top)
    return TokenLogprob(chr(token), bytes([token]), score.logprob, top)


class ByteFormat:
    """The prompt is the last message's text; every format feature is claimed."""

    name = "bytes"

    def capabilities(self) -> Capabilities:
        return Capabilities(None, True, True, ("low", "medium", "high"))

    def warm(self) -> None:
        pass

    def render(self, request: ChatRequest) -> Rendered:
        return Rendered(Prompt(tuple(request.messages[-1].text.encode())), frozenset({END}))

    def parser(self, request: ChatRequest, choice: int = 0) -> ByteParser:
        return ByteParser(request.sampling.stop, choice)

    def render_text(self, request: TextRequest) -> Rendered:
        prompt = request.prompt
        ids = tuple(prompt.encode()) if isinstance(prompt, str) else prompt
        return Rendered(Prompt(ids), frozenset({END}))

    def text_parser(self, request: TextRequest, choice: int = 0) -> ByteParser:
        return ByteParser(request.sampling.stop, choice)


def ids(text: str) -> tuple[int, ...]:
    return tuple(text.encode("latin-1"))


def service_with(
    engine: Engine, model_id: str = "tiny/model", defaults: Sampling | None = None
) -> Service:
    """A ready service over `engine` speaking ByteFormat."""
    service = Service(model_id)
    fmt = ByteFormat()
    card = ModelCard(
        model_id, engine.context_length, fmt.capabilities(), defaults=defaults or Sampling()
    )
    service.attach(ServedModel(card, fmt, engine))
    return service
