"""Harmony token ids to events: a state machine that is total.

Rules of this file:
- everything is decided by ids; a control token written out as text is text;
- nothing raises, whatever the ids, and no text is lost: what stands where a header should be and is
  none becomes content;
- control tokens, channel words and other header text never come out.

A header is what stands between <|start|> and <|message|>: role, channel and recipient in either
order, constraint. It may be cut short anywhere. The message after it goes by its header: a
recipient makes it a call, analysis makes it reasoning, all else is content. Any control token
that begins a header begins one wherever it stands, so the machine finds its way back at the next.
Used by harmony.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from serve.engine.face import TokenScore
from serve.formats.calls import CallWriter
from serve.formats.harmony_render import Marks
from serve.formats.text import Beginnings, ContentWriter, Detokenizer, detokenizer
from serve.formats.vocabulary import Vocabulary
from serve.values import ContentEvent, FinishReason, ReasoningDelta

Kind = Literal["content", "reasoning", "call"]

# No header is longer: a role, a channel, a constraint and a name of 64 characters.
MAX_HEADER_TOKENS = 64
BETWEEN = "\n\n"  # what joins two messages that become one field

_CHANNEL = re.compile(r"analysis|commentary|final")
_RECIPIENT = re.compile(r"(?:to\s*=\s*|(?=functions\.))([^\s<]*)")
_NOT_TOOLS = ("assistant", "all", "user", "")
# What headers are made of. Where no control token began the header only the first kind counts: the
# rest are words that an answer may well begin with.
_OWN_WORDS = re.compile(r"\s*(?:assistant|analysis|commentary|final|json|to\s*=\s*[\w.\-]*)")
_ANY_WORDS = re.compile(
    _OWN_WORDS.pattern.removesuffix(")") + r"|system|developer|user|tool|code|functions\.[\w\-]*)"
)
_BEGINNINGS = Beginnings(("analysis", "commentary", "assistant", "to=", "functions."))


class HarmonyParser:
    """One choice. `starts_open`: the prompt ended inside a final message that goes on."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        marks: Marks,
        calls: CallWriter,
        content: ContentWriter,
        *,
        choice: int = 0,
        starts_open: bool = False,
        takes_calls: bool = True,
        shows_preambles: bool = True,
    ) -> None:
        self.reasoning_tokens = 0
        self._vocabulary = vocabulary
        self._marks = marks
        self._hidden = vocabulary.control_ids
        self._headers = (marks.start, marks.channel, marks.constrain)
        self._ends = (marks.end, marks.returns, marks.call)
        self._calls = calls
        self._content = content
        self._choice = choice
        self._takes_calls = takes_calls
        self._shows_preambles = shows_preambles
        self._kind: Kind | None = "content" if starts_open else None  # None: inside a header
        self._header: list[int] = []
        self._text: Detokenizer = detokenizer(vocabulary)
        self._wrote: dict[Kind, bool] = {"content": False, "reasoning": False, "call": False}
        self._joins = False  # the next text of this message follows another message's
        self._is_done = False

    @property
    def is_stopped(self) -> bool:
        return self._content.is_stopped or self._is_done

    def feed(self, ids: Sequence[int], scores: Sequence[TokenScore] = ()) -> list[ContentEvent]:
        events: list[ContentEvent] = []
        for i, token in enumerate(ids):
            if self.is_stopped:
                break
            if token in self._hidden:
                events += self._mark(token)
            elif self._kind is None:
                events += self._head(token)
            else:
                if self._kind == "content" and i < len(scores):
                    self._content.score(token, scores[i])
                self.reasoning_tokens += self._kind == "reasoning"
                events += self._say(self._text.push(token))
        return events

    def finish(self) -> list[ContentEvent]:
        if self.is_stopped:
            return []
        return [*self._close(is_whole=False), *self._content.flush()]

    def reason(self, ended: FinishReason) -> FinishReason:
        return "tool_calls" if ended == "stop" and self._calls.count else ended

    # -- headers ---------------------------------------------------------------------------------

    def _mark(self, token: int) -> list[ContentEvent]:
        """A control token: ends what it ends, begins what it begins, is never shown."""
        if token == self._marks.message:
            return self._open() if self._kind is None else []
        if token in self._ends:
            return self._close(is_whole=True)
        if token not in self._headers:
            return []
        if token == self._marks.constrain and self._kind is not None:
            return []
        events: list[ContentEvent] = []
        if token == self._marks.start or self._kind is not None:
            events = self._close(is_whole=True)
        self._header.append(token)
        return events

    def _head(self, token: int) -> list[ContentEvent]:
        self._header.append(token)
        if len(self._header) <= MAX_HEADER_TOKENS:
            return []
        return self._leftover(is_whole=True)

    def _open(self) -> list[ContentEvent]:
        """<|message|>: the header is complete and says what follows."""
        kind, name = self._meaning(self._words(self._header)[0])
        return self._begin(kind, name)

    def _begin(self, kind: Kind, name: str) -> list[ContentEvent]:
        self._header = []
        self._kind = kind
        self._text = detokenizer(self._vocabulary)
        self._joins = self._wrote[kind]
        if kind != "call":
            return []
        if self._calls.is_full:
            self._is_done = True
            return []
        return self._calls.start(name)

    def _meaning(self, header: str) -> tuple[Kind, str]:
        recipient = _RECIPIENT.search(header)
        if recipient is not None and recipient[1] not in _NOT_TOOLS and self._takes_calls:
            name = self._calls.name(recipient[1])
            if name:
                return "call", name
        channel = _CHANNEL.search(_RECIPIENT.sub(" ", header))
        if channel is None:
            return "content", ""
        if channel[0] == "analysis" or (channel[0] == "commentary" and not self._shows_preambles):
            return "reasoning", ""
        return "content", ""

    def _words(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """Ids of a header as text, a control token being a space, and where each id ends in it."""
        reader = detokenizer(self._vocabulary)
        text = ""
        edges: list[int] = []
        for token in ids:
            text += " " if token in self._hidden else reader.push(token)
            edges.append(len(text))
        return text + reader.flush(), edges

    def _leftover(self, *, is_whole: bool) -> list[ContentEvent]:
        """A header that no message followed: what is not header text was meant to be said."""
        header, self._header = self._header, []
        if not header:
            return []
        starts = [i for i, token in enumerate(header) if token in self._headers or i == 0]
        words, said = "", ""
        for start, end in zip(starts, [*starts[1:], len(header)], strict=True):
            is_last = end == len(header)
            word, rest = self._divide(header[start:end], is_cut=is_last and not is_whole)
            words += word + " "
            said += rest
        said = said.lstrip()
        if not said:
            return []
        kind, name = self._meaning(words)
        self.reasoning_tokens += len(header) if kind == "reasoning" else 0
        return [*self._begin(kind, name), *([] if self._is_done else self._say(said))]

    def _divide(self, segment: Sequence[int], *, is_cut: bool) -> tuple[str, str]:
        """The header words that one control token's part of a header begins with, and the rest.
        `is_cut`: the stream ended in it, perhaps inside a word."""
        text, edges = self._words(segment)
        has_mark = segment[0] in self._headers
        pattern = _ANY_WORDS if has_mark else _OWN_WORDS
        at = 0
        while (end := _word_end(pattern, text, at, edges)) is not None:
            at = end
        rest = text[at:]
        if is_cut and self._is_word_begun(segment[0], text, rest.strip()):
            rest = ""
        return text[:at], rest

    def _is_word_begun(self, first: int, text: str, rest: str) -> bool:
        """Whether what is left is the beginning of a header's word: of a known one, or of the
        channel's name whatever it is."""
        if first == self._marks.channel and text.strip() == rest and len(rest.split()) == 1:
            return True
        has_mark = first in self._headers
        return (has_mark or rest == "to") and _BEGINNINGS.at_end(rest) == len(rest)

    # -- messages --------------------------------------------------------------------------------

    def _say(self, text: str) -> list[ContentEvent]:
        if not text:
            return []
        kind = self._kind
        assert kind is not None
        if kind == "call":
            return self._calls.write(text)
        if self._joins:
            text = BETWEEN + text
            self._joins = False
        self._wrote[kind] = True
        if kind == "reasoning":
            return [ReasoningDelta(text, self._choice)]
        return self._content.write(text)

    def _close(self, *, is_whole: bool) -> list[ContentEvent]:
        """The message ends here; `is_whole` False: the stream ended inside it."""
        events: list[ContentEvent] = []
        if self._kind is None:
            events += self._leftover(is_whole=is_whole)
        if self._kind is not None and not self._is_done:
            events += self._say(self._text.flush())
            if self._kind == "call" and is_whole:
                events += self._calls.end()
        self._kind = None
        self._header = []
        return events


def _word_end(pattern: re.Pattern[str], text: str, at: int, edges: Sequence[int]) -> int | None:
    """Where the header word at `at` ends: with an id, so that "finally" is no "final"."""
    word = pattern.match(text, at)
    if word is None:
        return None
    ends = [edge for edge in edges if at < edge <= word.end()]
    return next((e for e in reversed(ends) if pattern.fullmatch(text, at, e)), None)
