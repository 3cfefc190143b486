"""A prompt format for looking at the page: ids are UTF-8 bytes, every message is in the prompt."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from serve.engine.face import Prompt, TokenScore
from serve.formats.base import Rendered
from serve.values import ChatRequest, ContentEvent, ReasoningDelta, TextDelta
from tests.fakes import END, ByteFormat, ByteParser


def encoded(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


class Utf8Parser(ByteParser):
    """ByteParser whose bytes make characters."""

    def __init__(self, stop: Sequence[str] = (), choice: int = 0) -> None:
        super().__init__(stop, choice)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int], scores: Sequence[TokenScore] = ()) -> list[ContentEvent]:
        events: list[ContentEvent] = []
        for token in ids:
            for event in self._one(token):
                events += self._whole(event)
        return events

    def _whole(self, event: ContentEvent) -> list[ContentEvent]:
        if not isinstance(event, TextDelta | ReasoningDelta):
            return [event]
        text = self._decoder.decode(event.text.encode("latin-1"))
        return [type(event)(text, event.choice)] if text else []


class TextFormat(ByteFormat):
    """The prompt is every message's text, parted by U+001E."""

    def render(self, request: ChatRequest) -> Rendered:
        said = "\x1e".join(f"{m.role}: {m.text}" if m.role == "system" else m.text
                           for m in request.messages)  # fmt: skip
        return Rendered(Prompt(encoded(said) or (32,)), frozenset({END}))

    def parser(self, request: ChatRequest, choice: int = 0) -> Utf8Parser:
        return Utf8Parser(request.sampling.stop, choice)
