"""One parser case run every way a stream can be cut, the events demanded to be the same.

`events` joins neighbouring deltas and forgets call ids, which are made up anew each time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

from serve.formats.base import StreamParser
from serve.values import (
    ContentEvent,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStarted,
)

Told = tuple[str, int, str]  # what it is, which call, the text


def events(found: Iterable[ContentEvent]) -> list[Told]:
    """Events as comparable tuples, neighbouring deltas of one kind joined, empty ones refused."""
    told: list[Told] = []
    for event in found:
        one = _told(event)
        assert one[2], f"an empty event: {event}"
        if told and one[0] != "call" and told[-1][:2] == one[:2]:
            told[-1] = (*one[:2], told[-1][2] + one[2])
        else:
            told.append(one)
    return told


def _told(event: ContentEvent) -> Told:
    match event:
        case TextDelta(text):
            return ("text", 0, text)
        case ReasoningDelta(text):
            return ("reasoning", 0, text)
        case ToolCallStarted(call, _, name):
            return ("call", call, name)
        case ToolCallDelta(call, arguments):
            return ("arguments", call, arguments)
    raise AssertionError(event)


def read(parser: StreamParser, pieces: Iterable[Sequence[int]]) -> tuple[list[Told], str, int]:
    """Everything one run tells: events, the reason for an engine's "stop", reasoning tokens."""
    found: list[ContentEvent] = []
    for piece in pieces:
        found += parser.feed(piece)
    found += parser.finish()
    return events(found), parser.reason("stop"), parser.reasoning_tokens


def read_every_way(
    make: Callable[[], StreamParser], ids: Sequence[int], cuts: int = 4
) -> tuple[list[Told], str, int]:
    """Whole, one id at a time and cut at random places: the same, or the test fails."""
    whole = read(make(), [ids])
    assert read(make(), [[token] for token in ids]) == whole
    draw = random.Random(len(ids))
    for _ in range(cuts):
        places = sorted(draw.randrange(len(ids) + 1) for _ in range(draw.randrange(1, 6)))
        edges = [0, *places, len(ids)]
        pieces = [ids[a:b] for a, b in zip(edges, edges[1:], strict=False)]
        assert read(make(), pieces) == whole
    return whole


def joined(told: Iterable[Told], kind: str) -> str:
    return "".join(text for which, _, text in told if which == kind)
