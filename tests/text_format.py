"""A prompt format for looking at the page: ids are UTF-8 bytes, every message is in the prompt."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from serve.engine.face import Prompt, TokenScore
from serve.formats.base import Rendered
from serve.values import (
    Capabilities,
    ChatRequest,
    ContentEvent,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    TextRequest,
    ToolCallDelta,
    ToolCallStarted,
)

END = 0  # the id that ends an answer
THINK, SAY, CALL = 1, 2, 3  # what follows is reasoning, text, a call written name(arguments
BETWEEN = "\x1e"  # parts the messages in the prompt


def encoded(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


class TextParser:
    """THINK, SAY and CALL switch what the bytes are."""

    is_stopped = False

    def __init__(self) -> None:
        self.reasoning_tokens = 0
        self._mode = SAY
        self._call = ""
        self._calls = -1
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int], scores: Sequence[TokenScore] = ()) -> list[ContentEvent]:
        return [event for token in ids for event in self._one(token)]

    def _one(self, token: int) -> list[ContentEvent]:
        if token in (END, THINK, SAY, CALL):
            self._mode = token
            self._call = ""
            self._calls += token == CALL
            return []
        text = self._decoder.decode(bytes([token]))
        if self._mode == CALL:
            return self._take_call(text)
        self.reasoning_tokens += self._mode == THINK
        if not text:
            return []
        return [ReasoningDelta(text) if self._mode == THINK else TextDelta(text)]

    def _take_call(self, text: str) -> list[ContentEvent]:
        if self._call.endswith("("):
            return [ToolCallDelta(self._calls, text)]
        self._call += text
        if text != "(":
            return []
        return [ToolCallStarted(self._calls, f"call_{self._calls}", self._call[:-1])]

    def finish(self) -> list[ContentEvent]:
        return []

    def reason(self, ended: FinishReason) -> FinishReason:
        return "tool_calls" if ended == "stop" and self._calls >= 0 else ended


class TextFormat:
    """The prompt is every message's text, parted by BETWEEN; the system's says that it is one."""

    name = "text"

    def capabilities(self) -> Capabilities:
        return Capabilities(None, True, True, ("low", "medium", "high"))

    def render(self, request: ChatRequest) -> Rendered:
        said = [f"system: {m.text}" if m.role == "system" else m.text for m in request.messages]
        return Rendered(Prompt(encoded(BETWEEN.join(said)) or (32,)), frozenset({END}))

    def parser(self, request: ChatRequest, choice: int = 0) -> TextParser:
        return TextParser()

    def render_text(self, request: TextRequest) -> Rendered:
        prompt = request.prompt
        ids = encoded(prompt) if isinstance(prompt, str) else prompt
        return Rendered(Prompt(ids), frozenset({END}))

    def text_parser(self, request: TextRequest) -> TextParser:
        return TextParser()
