"""Latest wins: a fast producer and a reader that looks at most ten times a second.

The producer never waits for the reader, so the model runs as fast with the page open as without,
and the page is never behind. Knows no widgets and no events' meaning. Used by chat.py and
endpoints.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from serve.ui.answer import Answer
from serve.ui.visit import Visit
from serve.values import Event

INTERVAL_SECONDS = 0.1
# Gradio notices a closed tab only when its generator yields; and the page, that all is well.
SIGN_OF_LIFE_SECONDS = 1.0


async def watch(
    events: AsyncGenerator[Event], answer: Answer, interval: float = INTERVAL_SECONDS
) -> AsyncGenerator[None]:
    """Fold `events` into `answer`; yields when there is news, the first at once, the last always,
    and once a second when there is none.

    Closing this generator early closes `events`, which cancels the work behind it within one step.
    """
    news, end = asyncio.Event(), asyncio.Event()
    producer = asyncio.create_task(_drain(events, answer, news, end))
    try:
        is_last = False
        while not is_last:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), SIGN_OF_LIFE_SECONDS)
            news.clear()
            is_last = end.is_set()
            yield
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(end.wait(), 0 if is_last else interval)
        await producer  # a bug in the producer is raised here, not lost
    finally:
        producer.cancel()
        await asyncio.gather(producer, return_exceptions=True)


async def counted(events: AsyncGenerator[Event], visit: Visit) -> AsyncGenerator[Event]:
    """`events`, spent from the visitor's budget. Raises RateLimited before the first."""
    ticket = visit.admit()
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                ticket.see(event)
                yield event
    finally:
        ticket.close()


async def _drain(
    events: AsyncGenerator[Event], answer: Answer, news: asyncio.Event, end: asyncio.Event
) -> None:
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                answer.take(event)
                news.set()
    finally:
        end.set()
        news.set()
