"""Several event streams as one: the prompts of one /v1/completions request.

They run at the same time; choices are counted on from stream to stream; there is one Accepted and
one terminal event, the first failure if there is one. Used by openai_compat.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from serve.errors import EngineFailed
from serve.values import (
    Accepted,
    Cancelled,
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    Queued,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStarted,
    Usage,
    is_terminal,
)

log = logging.getLogger(__name__)


async def together(streams: Sequence[AsyncGenerator[Event]], n: int) -> AsyncGenerator[Event]:
    """Events of all `streams`, each of which has `n` choices."""
    arrived: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(stream, i, arrived)) for i, stream in enumerate(streams)]
    for pump in pumps:
        pump.add_done_callback(lambda pump: _report(pump, arrived))
    joint = _Joint(len(streams), n)
    try:
        while not joint.has_ended:
            for event in joint.take(*await arrived.get()):
                yield event
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


class _Joint:
    """What has come of the streams so far, and what it makes of the next event."""

    def __init__(self, streams: int, n: int) -> None:
        self._streams = streams
        self._n = n
        self._accepted: list[Accepted] = []
        self._early: list[Event] = []
        self._finished: list[Finished] = []
        self.has_ended = False

    def take(self, number: int, event: Event) -> list[Event]:
        match event:
            case Failed() | Cancelled():
                self.has_ended = True
                return [event]
            case Finished():
                self._finished.append(event)
                return self._end()
            case Accepted():
                self._accepted.append(event)
                return self._begin()
        shifted = _shifted(event, number * self._n)
        if len(self._accepted) == self._streams:
            return [shifted]
        self._early.append(shifted)
        return []

    def _begin(self) -> list[Event]:
        if len(self._accepted) < self._streams:
            return []
        return [Accepted(sum(one.prompt_tokens for one in self._accepted)), *self._early]

    def _end(self) -> list[Event]:
        self.has_ended = len(self._finished) == self._streams
        if not self.has_ended:
            return []
        usage = _sum([end.usage for end in self._finished])
        return [Finished(usage, self._finished[-1].timing)]


async def _pump(
    stream: AsyncGenerator[Event], number: int, arrived: asyncio.Queue[tuple[int, Event]]
) -> None:
    async with contextlib.aclosing(stream):
        async for event in stream:
            arrived.put_nowait((number, event))
            if is_terminal(event):
                return


def _report(pump: asyncio.Task[None], arrived: asyncio.Queue[tuple[int, Event]]) -> None:
    """A stream that broke its promise and raised still ends the whole."""
    if not pump.cancelled() and (error := pump.exception()) is not None:
        log.error("a prompt's events broke off", exc_info=error)
        arrived.put_nowait((0, Failed(EngineFailed("The answer to a prompt broke off."))))


def _shifted(event: Event, by: int) -> Event:
    counted = TextDelta | ReasoningDelta | ToolCallStarted | ToolCallDelta | ChoiceFinished
    if isinstance(event, counted):
        return replace(event, choice=event.choice + by)
    assert isinstance(event, Queued)
    return event


def _sum(usages: Sequence[Usage]) -> Usage:
    return Usage(
        sum(usage.prompt_tokens for usage in usages),
        sum(usage.completion_tokens for usage in usages),
        sum(usage.cached_tokens for usage in usages),
        sum(usage.reasoning_tokens for usage in usages),
    )
