"""Tool calls written as JSON objects, read while they arrive.

    {"name": "look", "arguments": {"at": 3}}      between tags, in a list, or bare
    look[ARGS]{"at": 3}                           the name before its arguments

The name is told as soon as it is whole and the arguments as they come, exactly as written. What
turns out to be no call is given back as text. Knows no tokens. Used by tag_parse.py.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Literal

from serve.formats.calls import CallWriter, arguments_text
from serve.values import ContentEvent

State = Literal["between", "head", "arguments", "tail"]

_STRING = r'"(?:[^"\\]|\\.)*"'
_HEAD = re.compile(
    rf'\{{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*({_STRING})\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\S)'
)
_NAMED = re.compile(r"\s*([\w.\-]+)\s*(?:\[CALL_ID\]\s*[\w\-]*\s*)?(?:\[ARGS\])?\s*(?=\{)")
_MAYBE_NAMED = re.compile(r"[\w.\-\[\]\s]*")
_SEPARATORS = " \t\r\n,;[]"
_STRUCTURE = re.compile(r'["{}\[\]]')
_STRING_END = re.compile(r'"|\\.?', re.DOTALL)


class JsonSpan:
    """Where a JSON value ends in a text that arrives in pieces. Numbers and words end before the
    "," "}" or "]" that follows them."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._is_escaped = False
        self._is_bare = False

    def end(self, text: str, start: bool = False) -> int | None:
        """The end of the value in `text`, which follows what was given before; None: not yet."""
        at = 0
        if start and text[0] not in '{["':
            self._is_bare = True
        if self._is_bare:
            found = re.search(r"[,}\]\s]", text)
            return found.start() if found else None
        while at < len(text):
            found_at = self._string_end(text, at) if self._in_string else self._next(text, at)
            if found_at is None:
                return None
            at = found_at
            if self._depth == 0 and not self._in_string:
                return at
        return None

    def _next(self, text: str, at: int) -> int | None:
        found = _STRUCTURE.search(text, at)
        if found is None:
            return None
        if found[0] == '"':
            self._in_string = True
        else:
            self._depth += 1 if found[0] in "{[" else -1
        return found.end()

    def _string_end(self, text: str, at: int) -> int | None:
        if self._is_escaped:
            self._is_escaped = False
            at += 1
        while (found := _STRING_END.search(text, at)) is not None:
            if found[0] == '"':
                self._in_string = False
                return found.end()
            self._is_escaped = found[0] == "\\"
            at = found.end()
        return None


@dataclass(slots=True)
class Read:
    """What a piece of text told: events, text that is no call, and what follows the calls once
    they are over (`rest` None: still inside)."""

    events: list[ContentEvent] = field(default_factory=list)
    said: str = ""
    rest: str | None = None


class JsonCallReader:
    """`opens` and `closes` are the tags around the calls ("" for none). `is_bare`: nothing marks a
    call but its shape, so only a declared tool's name makes one."""

    def __init__(
        self, calls: CallWriter, *, opens: str = "", closes: str = "", is_bare: bool = False
    ) -> None:
        self._calls = calls
        self._opens = opens
        self._closes = closes
        self._is_bare = is_bare
        self._state: State = "between"
        self._buffer = ""
        self._span = JsonSpan()
        self._scanned = 0
        self._has_outer = False
        self._is_held = False
        self._starts = False
        self.is_over_limit = False

    def read(self, text: str, *, is_last: bool = False) -> Read:
        self._buffer += text
        told = Read()
        while told.rest is None and not self.is_over_limit:
            if not getattr(self, f"_{self._state}")(told, is_last):
                break
        if is_last and told.rest is None and not self.is_over_limit:
            told.said += self._buffer if self._state in ("between", "head") else ""
            told.rest = ""
        return told

    def _between(self, told: Read, is_last: bool) -> bool:
        """Before a call. False: more text is needed."""
        while self._buffer:
            mark = self._mark()
            if mark == "wait":
                self._buffer = "" if is_last else self._buffer  # a tag cut short says nothing
                return False
            if mark == "close":
                told.rest = self._buffer.removeprefix(self._closes)
                return True
            if mark == "open":
                self._buffer = self._buffer.removeprefix(self._opens)
            elif self._buffer[0] in _SEPARATORS:
                self._buffer = self._buffer[1:]
            else:
                break
        if not self._buffer:
            return False
        if self._buffer[0] == "{":
            return self._begin("head")
        return self._named(told, is_last)

    def _mark(self) -> str:
        """Whether a tag stands here, or may yet."""
        for mark, kind in ((self._opens, "open"), (self._closes, "close")):
            if mark and self._buffer.startswith(mark):
                return kind
        marks = (self._opens, self._closes)
        return "wait" if any(m.startswith(self._buffer) for m in marks if m) else ""

    def _named(self, told: Read, is_last: bool) -> bool:
        named = _NAMED.match(self._buffer)
        if named is not None and self._calls.name(named[1]):
            self._buffer = self._buffer[named.end() :]
            return self._start(told, named[1], has_outer=False)
        if _MAYBE_NAMED.fullmatch(self._buffer) and not is_last and not self._is_bare:
            return False
        if not self._closes:
            told.rest, self._buffer = self._buffer, ""
            return True
        said, mark, rest = self._buffer.partition(self._closes)
        if not mark and not is_last:
            return False
        told.said += said
        self._buffer = mark + rest
        return bool(mark)

    def _begin(self, state: State, span: JsonSpan | None = None) -> bool:
        self._state = state
        self._span = span or JsonSpan()
        self._scanned = 0
        return True

    def _head(self, told: Read, is_last: bool) -> bool:
        head = _HEAD.match(self._buffer)
        if head is not None:
            name = _unquoted(head[1])
            if self._takes(name):
                self._buffer = self._buffer[head.end() :]
                return self._start(told, name, has_outer=True)
        if self._is_bare and (head is not None or not _MAYBE_HEAD.fullmatch(self._buffer)):
            told.rest, self._buffer = self._buffer, ""
            return True
        end = self._span.end(self._buffer[self._scanned :])
        if end is None:
            self._scanned = len(self._buffer)
            return False
        whole = self._buffer[: self._scanned + end]
        self._buffer = self._buffer[len(whole) :]
        self._whole(told, whole)
        return self._begin("between")

    def _whole(self, told: Read, text: str) -> None:
        """An object whose keys stood in another order, or that is no call."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        call = found.get("function", found) if isinstance(found, dict) else None
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(name, str) or not self._takes(name):
            told.said += text
        elif self._calls.is_full:
            self.is_over_limit = True
        else:
            arguments = call.get("arguments", call.get("parameters"))
            told.events += self._calls.start(self._calls.name(name))
            told.events += self._calls.write(arguments_text(arguments))
            told.events += self._calls.end()

    def _takes(self, name: str) -> bool:
        return bool(self._calls.name(name)) and (not self._is_bare or self._calls.is_declared(name))

    def _start(self, told: Read, name: str, *, has_outer: bool) -> bool:
        if self._calls.is_full:
            self.is_over_limit = True
            return False
        told.events += self._calls.start(self._calls.name(name))
        self._has_outer = has_outer
        self._is_held = not self._buffer.startswith(("{", "["))
        self._starts = True
        return self._begin("arguments")

    def _arguments(self, told: Read, is_last: bool) -> bool:
        if len(self._buffer) == self._scanned and not (is_last and self._buffer):
            return False
        end = self._span.end(self._buffer[self._scanned :], start=self._starts)
        self._starts = False
        upto = len(self._buffer) if end is None else self._scanned + end
        if self._is_held and end is None and not is_last:
            self._scanned = upto  # arguments inside a string are unquoted when it is whole
            return False
        written, self._buffer = self._buffer[:upto], self._buffer[upto:]
        self._scanned = 0
        if self._is_held:
            written = _unquoted(written)
        told.events += self._calls.write("" if written == "null" else written)
        if end is None:
            return False
        told.events += self._calls.end()
        return self._begin("tail", JsonSpan(1)) if self._has_outer else self._begin("between")

    def _tail(self, told: Read, is_last: bool) -> bool:
        """The rest of the object around the arguments: its other keys say nothing, what is no JSON
        is text. The closing tag ends an object that is never closed."""
        end = self._span.end(self._buffer[self._scanned :])
        upto = len(self._buffer) if end is None else self._scanned + end
        first = max(0, self._scanned - len(self._closes))
        closed = self._buffer.find(self._closes, first, upto) if self._closes else -1
        if end is None and closed < 0 and not is_last:
            self._scanned = upto
            return False
        upto = upto if closed < 0 else closed
        rest, self._buffer = self._buffer[:upto], self._buffer[upto:]
        told.said += "" if _ends_an_object(rest) else rest
        return self._begin("between") if end is not None or closed >= 0 else False


def _ends_an_object(text: str) -> bool:
    """Whether `text` could follow a value in an object and close it, or leave just that out."""
    for whole in (f'{{"":0{text}', f'{{"":0{text}}}'):
        try:
            json.loads(whole)
        except (ValueError, RecursionError):
            continue
        return True
    return False


def _unquoted(text: str) -> str:
    try:
        found = json.loads(text)
    except ValueError:
        return text.strip('"')
    return found if isinstance(found, str) else text


def _any_beginning(parts: list[str]) -> str:
    """A pattern for every beginning of the parts in a row."""
    pattern = ""
    for part in reversed(parts):
        pattern = f"(?:{part}{pattern})?"
    return pattern


def _letters(word: str) -> list[str]:
    return [re.escape(letter) for letter in word]


_TYPED = [*_letters('"type"'), r"\s*", ":", r"\s*", *_letters('"function"'), r"\s*", ",", r"\s*"]
_REST = [
    *_letters('"name"'), r"\s*", ":", r"\s*", '"', r"(?:[^\"\\]|\\.)*\\?", '"', r"\s*", ",",
    r"\s*", '"', "(?:a|p)", "[a-z]*", '"', r"\s*", ":", r"\s*",
]  # fmt: skip
_MAYBE_HEAD = re.compile(
    r"\{\s*(?:" + _any_beginning(_REST) + "|" + _any_beginning([*_TYPED, *_REST]) + ")",
    re.DOTALL,
)
