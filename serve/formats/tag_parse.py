"""Answers with tags to events: reasoning between its tags, tool calls in the family's syntax.

Tags are looked for in the text, so it does not matter whether a vocabulary has one token for a tag
or spells it; control tokens that are tags of this model count as their text. Total: nothing raises,
nothing is lost, and a tag that may still become one is kept back. Used by template.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from serve.engine.face import TokenScore
from serve.formats.calls import CallWriter
from serve.formats.dialects import CallSyntax, Reasoning
from serve.formats.json_calls import JsonCallReader, Read
from serve.formats.text import Beginnings, ContentWriter, detokenizer
from serve.formats.vocabulary import Vocabulary
from serve.formats.xml_calls import XmlCallReader
from serve.values import ContentEvent, FinishReason, ReasoningDelta, Tool

Mode = Literal["start", "reasoning", "after", "content", "call"]
PYTHON_TAG = "<|python_tag|>"  # Llama 3.1 may put it before a call


class TagParser:
    """One choice. `opens_in`: where the prompt's end leaves the answer."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        content: ContentWriter,
        calls: CallWriter,
        *,
        reasoning: Reasoning | None,
        syntax: CallSyntax | None,
        tools: Sequence[Tool] = (),
        hidden: frozenset[int],
        choice: int = 0,
        opens_in: Mode = "start",
    ) -> None:
        self.reasoning_tokens = 0
        self._content = content
        self._calls = calls
        self._reasoning = reasoning
        self._syntax = syntax if tools else None
        self._tools = tools
        self._choice = choice
        self._hidden = hidden
        self._text = detokenizer(vocabulary, is_start=opens_in != "content")
        self._mode: Mode = opens_in
        self._buffer = ""
        self._reader: JsonCallReader | XmlCallReader | None = None
        self._is_fresh = True  # nothing said yet in this stretch of reasoning or content
        self._is_after_call = False
        self._is_done = False
        opens = self._syntax.opens if self._syntax else ""
        closes = reasoning.closes if reasoning else ""
        self._opens = opens
        self._in_content = tuple(mark for mark in (opens, closes) if mark)
        self._in_reasoning = tuple(mark for mark in (closes, opens) if mark)
        self._content_ends = Beginnings(self._in_content)
        self._reasoning_ends = Beginnings(self._in_reasoning)
        self._shown = _shown(vocabulary, reasoning, self._syntax)

    @property
    def is_stopped(self) -> bool:
        return self._content.is_stopped or self._is_done

    def feed(self, ids: Sequence[int], scores: Sequence[TokenScore] = ()) -> list[ContentEvent]:
        events: list[ContentEvent] = []
        for i, token in enumerate(ids):
            if self.is_stopped:
                break
            text = self._shown.get(token)
            if text is None:
                if token in self._hidden:
                    continue
                text = self._text.push(token)
            self.reasoning_tokens += self._mode == "reasoning"
            if i < len(scores) and self._mode in ("start", "after", "content"):
                self._content.score(token, scores[i])
            self._buffer += text
            events += self._drain(is_last=False)
        return events

    def finish(self) -> list[ContentEvent]:
        if self.is_stopped:
            return []
        self._buffer += self._text.flush()
        return [*self._drain(is_last=True), *self._content.flush()]

    def reason(self, ended: FinishReason) -> FinishReason:
        return "tool_calls" if ended == "stop" and self._calls.count else ended

    def _drain(self, *, is_last: bool) -> list[ContentEvent]:
        events: list[ContentEvent] = []
        while not self.is_stopped and (self._buffer or is_last):
            before = (self._mode, len(self._buffer))
            if self._mode == "reasoning":
                events += self._think(is_last)
            elif self._mode == "call":
                events += self._call(is_last)
            elif self._mode == "content":
                events += self._say(is_last)
            else:
                self._begin(is_last)
            if before == (self._mode, len(self._buffer)):
                break
        return events

    def _begin(self, is_last: bool) -> None:
        """Before anything was said: a tag, a bare call, or content."""
        text = self._buffer.lstrip()
        tags = [PYTHON_TAG] if self._syntax and self._syntax.kind == "bare" else []
        if self._mode == "start" and self._reasoning:
            tags.append(self._reasoning.opens)
        for tag in tags:
            if text.startswith(tag):
                self._buffer = text[len(tag) :]
                if tag != PYTHON_TAG:
                    self._enter("reasoning")
                return
        if not is_last and (not text or any(tag.startswith(text) for tag in tags)):
            return
        if self._mode == "after":
            self._buffer = text
        if self._syntax and self._syntax.kind == "bare" and text.startswith("{"):
            self._buffer = text
            self._open_call()
        else:
            self._enter("content")

    def _enter(self, mode: Mode) -> None:
        if mode in ("reasoning", "call"):
            self._content.forget_scores()
        self._mode = mode
        self._is_fresh = True

    def _think(self, is_last: bool) -> list[ContentEvent]:
        text, mark, rest, kept = self._until(self._in_reasoning, self._reasoning_ends, is_last)
        if self._is_fresh:
            text = text.lstrip()
        events: list[ContentEvent] = []
        if text:
            self._is_fresh = False
            events.append(ReasoningDelta(text, self._choice))
        self._buffer = rest if mark else kept
        if mark and mark == self._opens:
            self._open_call()
        elif mark:
            self._enter("after")
        return events

    def _say(self, is_last: bool) -> list[ContentEvent]:
        text, mark, rest, kept = self._until(self._in_content, self._content_ends, is_last)
        if self._is_after_call:  # what separates calls is no content
            text = text.lstrip()
            self._is_after_call = not text
        events = self._content.write(text)
        self._buffer = rest if mark else kept
        if mark and mark == self._opens:
            self._open_call()
        return events

    def _until(
        self, marks: Sequence[str], ends: Beginnings, is_last: bool
    ) -> tuple[str, str, str, str]:
        """Text that may be told, the mark that ends it ("" for none), what follows the mark, and
        what is kept back. Whitespace before a mark belongs to the mark."""
        found = [(at, mark) for mark in marks if (at := self._buffer.find(mark)) >= 0]
        if found:
            at, mark = min(found)
            return self._buffer[:at].rstrip(), mark, self._buffer[at + len(mark) :], ""
        if is_last:
            text = self._buffer if self._mode == "content" else self._buffer.rstrip()
            return text, "", "", ""
        if not marks:
            return self._buffer, "", "", ""
        upto = len(self._buffer) - ends.at_end(self._buffer)
        upto = len(self._buffer[:upto].rstrip())
        return self._buffer[:upto], "", "", self._buffer[upto:]

    def _open_call(self) -> None:
        assert self._syntax is not None
        self._enter("call")
        syntax = self._syntax
        if syntax.kind == "xml":
            self._reader = XmlCallReader(self._calls, self._tools, closes=syntax.closes)
        else:
            self._reader = JsonCallReader(
                self._calls,
                opens=syntax.opens,
                closes=syntax.closes,
                is_bare=syntax.kind == "bare",
            )

    def _call(self, is_last: bool) -> list[ContentEvent]:
        assert self._reader is not None
        text, self._buffer = self._buffer, ""
        told: Read = self._reader.read(text, is_last=is_last)
        events = [*told.events, *self._content.write(told.said)]
        self._is_after_call = not told.said
        if self._reader.is_over_limit:
            self._is_done = True
        elif told.rest is not None:
            self._buffer = told.rest
            self._enter("content")
        return events


def _shown(
    vocabulary: Vocabulary, reasoning: Reasoning | None, syntax: CallSyntax | None
) -> dict[int, str]:
    """Control tokens that are tags of this model, and their text."""
    tags = [PYTHON_TAG, "[ARGS]", "[CALL_ID]"] if syntax else []
    for owner in (reasoning, syntax):
        if owner is not None:
            tags += [owner.opens, owner.closes]
    ids = [(vocabulary.id_of(tag), tag) for tag in tags if tag]
    return {
        token: tag for token, tag in ids if token is not None and token in vocabulary.control_ids
    }
