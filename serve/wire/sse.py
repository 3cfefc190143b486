"""Events to a client over HTTP: a stream of frames or one whole answer.

Both pull the first event before any status is sent, so that what fails early is a real HTTP
error; both stop the work when the client goes away. A stream is never silent for longer than
PING_SECONDS, joins what waits already into one write, and ends with its dialect's own ending
whatever happens, also when the server stops. Knows no dialect. Used by openai_compat.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.errors import ServeError, Unavailable
from serve.values import (
    Cancelled,
    Event,
    Failed,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    is_terminal,
)

log = logging.getLogger(__name__)

PING_SECONDS = 15.0
STALLED_READER_SECONDS = 60.0
PING = ": ping\n\n"
MAY_JOIN = 256  # neighbouring deltas of one write that become one frame, at most


class Watcher(Protocol):
    """Sees every event of one request, then its end, however it ended."""

    def see(self, event: Event) -> None: ...

    def close(self) -> None: ...


class Turn:
    """One request's events with those who watch them. `first` is None until `begin`."""

    def __init__(self, events: AsyncGenerator[Event], watchers: Iterable[Watcher] = ()) -> None:
        self._events = events
        self._watchers = tuple(watchers)
        self._first: Event | None = None
        self._is_closed = False
        self._is_cancelled = False
        self._task: asyncio.Task[Any] | None = None

    def cancel(self) -> None:
        """End the work on somebody's wish: the answer gets Cancelled as its terminal event."""
        self._is_cancelled = True
        if self._task is not None:
            self._task.cancel()

    async def begin(self) -> None:
        """Pull the first event. Raises the error of a request that is refused."""
        first: Event | None = None
        try:
            first = await anext(self._events, Cancelled())
            if isinstance(first, Failed):
                raise first.error
            if isinstance(first, Cancelled):
                raise Unavailable("The server is shutting down.", retry_after=5)
        finally:
            if first is None or is_terminal(first):
                await self.close()
        self._first = first

    async def run(self, take: Callable[[Event], None]) -> None:
        """Hand every event to the watchers and to `take`; exactly one terminal event, last."""
        self._task = asyncio.current_task()
        try:
            if self._first is not None:
                self._hand(self._first, take)
            async for event in self._events:
                self._hand(event, take)
        except asyncio.CancelledError:
            if not self._is_cancelled:
                raise
            take(Cancelled())
        except ServeError as error:
            take(Failed(error))
        except Exception:
            log.exception("an answer broke off")
            take(Failed(ServeError("Something broke while answering; the log has more.")))
        finally:
            await self.close()

    def _hand(self, event: Event, take: Callable[[Event], None]) -> None:
        for watcher in self._watchers:
            watcher.see(event)
        take(event)

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        for watcher in self._watchers:
            watcher.close()
        await self._events.aclose()


async def collect(turn: Turn, take: Callable[[Event], object], request: Request) -> bool:
    """The whole answer into `take`. False when the client went away first (the work is stopped
    then)."""
    found: list[Event] = []
    work = asyncio.create_task(turn.run(found.append))
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        is_here = work.done()
    finally:
        await _stop(gone)
        await _stop(work)
    if is_here:
        for event in joined(found):
            take(event)
    return is_here


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def joined(events: Iterable[Event]) -> list[Event]:
    """Neighbouring deltas of one kind, choice and call as one; log probabilities stay as they
    came."""
    found: list[Event] = []
    texts: list[str] = []
    last: Event | None = None
    for event in events:
        if last is not None and len(texts) < MAY_JOIN and _continues(last, event):
            texts.append(_text(event))
            continue
        _flush(found, last, texts)
        last, texts = event, [_text(event)]
    _flush(found, last, texts)
    return found


def _continues(last: Event, event: Event) -> bool:
    match last, event:
        case TextDelta(), TextDelta():
            return last.choice == event.choice and not last.logprobs and not event.logprobs
        case ReasoningDelta(), ReasoningDelta():
            return last.choice == event.choice
        case ToolCallDelta(), ToolCallDelta():
            return (last.choice, last.call) == (event.choice, event.call)
    return False


def _text(event: Event) -> str:
    match event:
        case TextDelta() | ReasoningDelta():
            return event.text
        case ToolCallDelta():
            return event.arguments
    return ""


def _flush(found: list[Event], last: Event | None, texts: list[str]) -> None:
    if last is None:
        return
    if len(texts) > 1:
        match last:
            case TextDelta():
                last = TextDelta("".join(texts), last.choice)
            case ReasoningDelta():
                last = ReasoningDelta("".join(texts), last.choice)
            case ToolCallDelta():
                last = ToolCallDelta(last.call, "".join(texts), last.choice)
    found.append(last)


class _Pulse:
    """A stream's one timer, so that a frame needs none: `arrived` is set, with `is_silent`, when
    nothing was written for PING_SECONDS; `limit` ends a write of STALLED_READER_SECONDS."""

    def __init__(self, arrived: asyncio.Event, limit: asyncio.Timeout) -> None:
        self._loop = asyncio.get_running_loop()
        self._arrived = arrived
        self._limit = limit
        self._since = self._loop.time()
        self._is_writing = False
        self._timer = self._loop.call_later(PING_SECONDS, self._look)
        self.is_silent = False

    def begin(self) -> None:
        self._since = self._loop.time()
        self._is_writing, self.is_silent = True, False

    def end(self) -> None:
        self._is_writing = False

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        now = self._loop.time()
        due = self._since + (STALLED_READER_SECONDS if self._is_writing else PING_SECONDS)
        if now >= due and self._is_writing:
            self._limit.reschedule(now)
            return
        if now >= due:
            self.is_silent = True
            self._arrived.set()
            due = now + PING_SECONDS
        self._timer = self._loop.call_at(min(due, now + PING_SECONDS), self._look)


class EventStream(Response):
    """A 200 whose body is `write`'s frames for a begun turn's events."""

    media_type = "text/event-stream"

    def __init__(
        self, turn: Turn, write: Callable[[Event], str], headers: dict[str, str] | None = None
    ) -> None:
        quiet = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(headers={**quiet, **(headers or {})})
        del self.headers["content-length"]
        self._turn = turn
        self._write = write
        self._waiting: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._has_ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._turn.run(self._take))
        gone = asyncio.create_task(_disconnected(receive))
        gone.add_done_callback(lambda _: self._arrived.set())
        try:
            async with asyncio.timeout(None) as limit:
                await self._send_all(send, limit, gone)
        except asyncio.CancelledError:  # the server stops: the client is told, then it goes on
            if not self._has_ended:
                await _send_last(send, self._write(Cancelled()))
            raise
        except (TimeoutError, OSError):
            log.info("a stream's reader is gone or reads nothing; its work is stopped")
        finally:
            await _stop(gone)
            await _stop(work)
            with contextlib.suppress(OSError, TimeoutError):
                await _send_last(send, "", is_end=True)

    def _take(self, event: Event) -> None:
        self._waiting.append(event)
        self._arrived.set()

    async def _send_all(self, send: Send, limit: asyncio.Timeout, gone: asyncio.Task[None]) -> None:
        pulse = _Pulse(self._arrived, limit)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            while not self._has_ended and not gone.done():
                await self._arrived.wait()
                self._arrived.clear()
                frames = self._frames() or (PING if pulse.is_silent else "")
                if frames:
                    pulse.begin()
                    await send(_body(frames))
                    pulse.end()
        finally:
            pulse.stop()

    def _frames(self) -> str:
        """Of all that waits."""
        events = joined(self._waiting) if len(self._waiting) > 1 else list(self._waiting)
        self._waiting.clear()
        self._has_ended = bool(events) and is_terminal(events[-1])
        return "".join([self._write(event) for event in events])


def _body(text: str, *, is_end: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": not is_end}


async def _send_last(send: Send, text: str, *, is_end: bool = False) -> None:
    async with asyncio.timeout(STALLED_READER_SECONDS):
        await send(_body(text, is_end=is_end))
