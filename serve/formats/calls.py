"""Tool calls as events: numbered without gaps, with ids of their own, names matched to the tools.

Shared by every parser that reads calls. Knows no syntax: it is told a name, then arguments.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence

from serve.values import ContentEvent, ToolCallDelta, ToolCallStarted

_NAME = re.compile(r"[\w.\-]+")
# Header text that a model ran into a name, as in "get_weathercommentary".
_STUCK = re.compile(r"(?:commentary|analysis|final|assistant|json)+")
MAX_NAME = 128


class CallWriter:
    """One choice's calls. `limit` 1 is parallel_tool_calls=False: a second call is not wanted."""

    def __init__(self, declared: Sequence[str], choice: int, limit: int | None = None) -> None:
        self._declared = tuple(declared)
        self._choice = choice
        self._limit = limit
        self.count = 0
        self._wrote = False

    @property
    def is_full(self) -> bool:
        return self._limit is not None and self.count >= self._limit

    def name(self, written: str) -> str:
        """The tool meant by what the model wrote, as declared where it can be told; "" if it is no
        name at all."""
        return snap(written, self._declared)

    def is_declared(self, written: str) -> bool:
        return self.name(written) in self._declared

    def start(self, name: str) -> list[ContentEvent]:
        call = self.count
        self.count += 1
        self._wrote = False
        return [ToolCallStarted(call, f"call_{secrets.token_hex(12)}", name, self._choice)]

    def write(self, arguments: str) -> list[ContentEvent]:
        if not arguments:
            return []
        self._wrote = True
        return [ToolCallDelta(self.count - 1, arguments, self._choice)]

    def end(self) -> list[ContentEvent]:
        """A call that ends with nothing written has no arguments, which in JSON is {}."""
        return [] if self._wrote else self.write("{}")


def snap(written: str, declared: Sequence[str]) -> str:
    """Match a written name to the declared ones: as it is, without its namespace, in another case,
    or with something stuck to its end; else cut to the characters that a name may have."""
    written = written.strip().strip("\"'`")
    short = written.removeprefix("functions.")
    for name in (written, short, short.rpartition(".")[2]):
        if name in declared:
            return name
    lower = {name.lower(): name for name in reversed(declared)}
    if short.lower() in lower:
        return lower[short.lower()]
    stuck = [n for n in declared if short.startswith(n) and not _continues(short[len(n) :])]
    if stuck:
        return max(stuck, key=len)
    found = _NAME.match(short)
    name = found[0].strip(".-")[:MAX_NAME] if found else ""
    return re.sub(rf"(?<=[^\W_]){_STUCK.pattern}$", "", name)


def _continues(rest: str) -> bool:
    """Whether `rest` makes a longer name of the name before it, rather than being header text."""
    return rest[:1] in "_-." or (rest[:1].isalnum() and _STUCK.match(rest) is None)


def arguments_text(arguments: object) -> str:
    """Arguments a model gave as JSON, as the string that the API speaks of."""
    if isinstance(arguments, str):
        return arguments
    return json.dumps({} if arguments is None else arguments, ensure_ascii=False)
