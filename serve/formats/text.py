"""Ids to text as it grows: no half characters, no stop strings, each token's exact bytes.

`Detokenizer` gives the text an id completes and keeps what is incomplete; the deltas joined are the
whole text decoded at once. `StopFilter` keeps back whatever may become a stop string.
`ContentWriter` puts the two ends together into TextDelta events. Knows no roles and no tags: the
parsers decide what is content. It runs on the event loop for every token, so each step is a lookup
and a few string operations.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from serve.engine.face import TokenScore
from serve.formats.vocabulary import Vocabulary
from serve.values import ContentEvent, FinishReason, TextDelta, TokenLogprob

_HELD_TOKENS = 16  # a window this long that still ends in U+FFFD is not a half character


class Detokenizer(Protocol):
    def push(self, token: int) -> str:
        """The text that `token` completes, "" while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is left: an incomplete character's bytes as U+FFFD."""
        ...


def detokenizer(vocabulary: Vocabulary, *, is_start: bool = True) -> Detokenizer:
    """A fresh reader. `is_start` False: the text continues another, so its first space counts."""
    if vocabulary.table is None:
        return _WindowDetokenizer(vocabulary)
    return _ByteDetokenizer(vocabulary, is_start and vocabulary.strips_first_space)


class _ByteDetokenizer:
    """Through the byte table: one lookup and one call of the C decoder a token."""

    def __init__(self, vocabulary: Vocabulary, strips_first_space: bool) -> None:
        assert vocabulary.table is not None
        self._table = vocabulary.table
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._strips = strips_first_space

    def push(self, token: int) -> str:
        if not 0 <= token < len(self._table):
            return ""
        text = self._decode(self._table[token])
        return self._first(text) if self._strips else text

    def flush(self) -> str:
        text = self._decode(b"", True)
        return self._first(text) if self._strips else text

    def _first(self, text: str) -> str:
        if text:
            self._strips = False
        return text.removeprefix(" ")


class _WindowDetokenizer:
    """Through the tokenizer's own decode, on a window of ids that starts at a text boundary.

    The text of ids[start:] minus the text of ids[start:read] is what the ids after `read` add.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._tokenizer = vocabulary.tokenizer
        self._size = vocabulary.size
        self._window: list[int] = []
        self._read = 0
        self._read_text = ""

    def push(self, token: int) -> str:
        if not 0 <= token < self._size:
            return ""
        self._window.append(token)
        return self._step(is_last=len(self._window) - self._read > _HELD_TOKENS)

    def flush(self) -> str:
        return self._step(is_last=True)

    def _step(self, *, is_last: bool) -> str:
        text = self._text(self._window)
        if text.endswith("�") and not is_last:
            return ""
        new = text[len(self._read_text) :]
        self._window = self._window[self._read :]
        self._read = len(self._window)
        self._read_text = self._text(self._window)
        return new

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


class StopFilter:
    """Passes text on up to the first stop string and keeps back what may become one.

    Where stop strings overlap, the one complete first wins, so that how the text was cut never
    matters.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._beginnings = Beginnings(self._stops)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        if not self._stops:
            return text
        if self.is_stopped:
            return ""
        text = self._held + text
        found = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = self._beginnings.at_end(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


class Beginnings:
    """The proper beginnings of some marks, to tell how much of a text's end to keep back."""

    def __init__(self, marks: Sequence[str]) -> None:
        self._known = frozenset(mark[:n] for mark in marks for n in range(1, len(mark)))
        self._last = frozenset(known[-1] for known in self._known)
        self._longest = max(map(len, self._known), default=0)

    def at_end(self, text: str) -> int:
        """Length of the longest end of `text` that is a proper beginning of a mark."""
        if not text or text[-1] not in self._last:
            return 0
        for length in range(min(len(text), self._longest), 0, -1):
            if text[-length:] in self._known:
                return length
        return 0


class ContentWriter:
    """Content text to TextDelta events: stop strings cut off, logprobs riding on the delta that
    completes their token's text."""

    def __init__(self, vocabulary: Vocabulary, stops: Sequence[str], choice: int) -> None:
        self._vocabulary = vocabulary
        self._stops = StopFilter(stops)
        self._choice = choice
        self._scores: list[TokenLogprob] = []
        self.has_written = False

    @property
    def is_stopped(self) -> bool:
        return self._stops.is_stopped

    def score(self, token: int, score: TokenScore) -> None:
        """Note the logprobs of a content token; call before writing the text it completes."""
        self._scores.append(token_logprob(self._vocabulary, token, score))

    def forget_scores(self) -> None:
        """What was noted since the last delta belonged to a tag."""
        self._scores = []

    def write(self, text: str) -> list[ContentEvent]:
        return self._event(self._stops.push(text)) if text else []

    def flush(self) -> list[ContentEvent]:
        return [] if self.is_stopped else self._event(self._stops.flush())

    def _event(self, text: str) -> list[ContentEvent]:
        if not text:
            return []
        scores, self._scores = tuple(self._scores), []
        self.has_written = True
        return [TextDelta(text, self._choice, scores)]


def token_logprob(vocabulary: Vocabulary, token: int, score: TokenScore) -> TokenLogprob:
    return TokenLogprob(
        *_named(vocabulary, token),
        score.logprob,
        tuple(TokenLogprob(*_named(vocabulary, other), logprob) for other, logprob in score.top),
    )


def _named(vocabulary: Vocabulary, token: int) -> tuple[str, bytes]:
    data = vocabulary.bytes_of(token)
    return data.decode("utf-8", "replace"), data


class TextParser:
    """Ids to content and nothing else: for raw prompts, and for models without tags."""

    reasoning_tokens = 0

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        hidden: frozenset[int],
        stops: Sequence[str] = (),
        choice: int = 0,
        is_start: bool = True,
    ) -> None:
        self._hidden = hidden
        self._text = detokenizer(vocabulary, is_start=is_start)
        self._content = ContentWriter(vocabulary, stops, choice)

    @property
    def is_stopped(self) -> bool:
        return self._content.is_stopped

    def feed(self, ids: Sequence[int], scores: Sequence[TokenScore] = ()) -> list[ContentEvent]:
        events: list[ContentEvent] = []
        for i, token in enumerate(ids):
            if self.is_stopped:
                break
            if token in self._hidden:
                continue
            if i < len(scores):
                self._content.score(token, scores[i])
            events += self._content.write(self._text.push(token))
        return events

    def finish(self) -> list[ContentEvent]:
        if self.is_stopped:
            return []
        return [*self._content.write(self._text.flush()), *self._content.flush()]

    def reason(self, ended: FinishReason) -> FinishReason:
        return ended
