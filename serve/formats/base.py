"""What a prompt format is: a way to write a conversation as token ids and to read ids back as
events.

Formats know channels, tags and templates; they know no HTTP, no torch and no engine. The tokenizer
is passed in. Used by service.py, which asks `choose` (in choose.py) for the format of the loaded
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from serve.engine.face import Grammar, Prompt, TokenScore
from serve.values import Capabilities, ChatRequest, ContentEvent, FinishReason, TextRequest


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation ready for the engine: the prompt, the ids that end an answer, and what binds
    it."""

    prompt: Prompt
    stop_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None


class StreamParser(Protocol):
    """Reads one choice's ids. Total: never raises, whatever the ids, and loses no text.

    Feeding ids together or one at a time gives the same events up to the joining of neighbouring
    deltas.
    """

    reasoning_tokens: int

    def feed(self, ids: Sequence[int], scores: Sequence[TokenScore] = ()) -> list[ContentEvent]: ...

    @property
    def is_stopped(self) -> bool:
        """True once a stop string was met: the rest of this choice is not wanted."""
        ...

    def finish(self) -> list[ContentEvent]:
        """Release what was held back. Called once, at the end of the choice."""
        ...

    def reason(self, ended: FinishReason) -> FinishReason:
        """The public reason for "stop" or "length" as the engine gave it: "length" wins, then
        "tool_calls"."""
        ...


class ChatFormat(Protocol):
    name: str

    def capabilities(self) -> Capabilities:
        """tools, reasoning and efforts as this format can serve them (vision is the model's)."""
        ...

    def render(self, request: ChatRequest) -> Rendered:
        """May be slow (template, tokenizer, grammar): call it off the event loop.
        Raises InvalidRequest or Unsupported naming the field."""
        ...

    def parser(self, request: ChatRequest, choice: int = 0) -> StreamParser: ...

    def warm(self) -> None:
        """Build now what the first structured answer would wait for; may take seconds."""
        ...

    def render_text(self, request: TextRequest) -> Rendered:
        """A raw prompt: text is tokenized as it is (with the model's own begin token), ids are
        checked."""
        ...

    def text_parser(self, request: TextRequest, choice: int = 0) -> StreamParser:
        """Ids to text and stop strings, nothing else."""
        ...
