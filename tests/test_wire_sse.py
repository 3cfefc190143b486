"""A stream's writes, on a clock that jumps: pings, readers that stall, the last frames."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.values import Accepted, Event, Finished, TextDelta, Timing, Usage
from serve.wire.sse import PING, PING_SECONDS, STALLED_READER_SECONDS, EventStream, Turn
from tests.jumping import run

END = Finished(Usage(), Timing(0.0, 0.0))
SCOPE = {"type": "http"}


@dataclass
class Reader:
    """Takes `seconds[i]` for write i of the body, none for those after; keeps when each began and
    ended."""

    seconds: list[float] = field(default_factory=list)
    writes: list[tuple[float, float, str]] = field(default_factory=list)
    is_ended: bool = False

    async def send(self, message: Any) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        if message["type"] == "http.response.body" and self.seconds:
            await asyncio.sleep(self.seconds.pop(0))
        if message["type"] == "http.response.body":
            self.writes.append((began, loop.time(), message["body"].decode()))
            self.is_ended |= not message["more_body"]

    async def receive(self) -> Any:
        await asyncio.Event().wait()

    @property
    def text(self) -> str:
        return "".join(text for _, _, text in self.writes)


class Watcher:
    closed = 0

    def see(self, event: Event) -> None: ...

    def close(self) -> None:
        self.closed += 1


async def said(*script: float | str) -> AsyncGenerator[Event]:
    yield Accepted(1)
    for part in script:
        if isinstance(part, str):
            yield TextDelta(part)
        else:
            await asyncio.sleep(part)
    yield END


def write(event: Event) -> str:
    return event.text if isinstance(event, TextDelta) else ""


async def streamed(reader: Reader, watcher: Watcher, *script: float | str) -> None:
    turn = Turn(said(*script), [watcher])
    await turn.begin()
    await EventStream(turn, write)(SCOPE, reader.receive, reader.send)


def test_a_silent_stream_pings_each_time_it_may_be_silent_no_longer() -> None:
    reader = Reader()
    run(streamed(reader, Watcher(), 4 * PING_SECONDS + 1, "a"))
    pings = [began for began, _, text in reader.writes if text == PING]
    assert pings == [PING_SECONDS * n for n in (1, 2, 3, 4)]
    assert reader.text == PING * 4 + "a"


@given(
    st.lists(st.one_of(st.floats(0.0, 60.0), st.text("abc", min_size=1)), max_size=12),
    st.lists(st.floats(0.0, 0.9 * STALLED_READER_SECONDS), max_size=12),
)
def test_words_arrive_in_order_and_no_silence_is_too_long(
    script: list[float | str], seconds: list[float]
) -> None:
    reader, watcher = Reader(seconds), Watcher()
    run(streamed(reader, watcher, *script))
    assert reader.text.replace(PING, "") == "".join(s for s in script if isinstance(s, str))
    for (began, ended, _), (after, _, _) in pairwise(reader.writes):
        assert after - ended <= PING_SECONDS + 1e-6
        assert after >= ended >= began
    assert reader.is_ended and watcher.closed == 1


def test_a_reader_that_reads_nothing_has_its_work_stopped() -> None:
    reader, watcher, ended = Reader([1.0, 1e6, 0.0]), Watcher(), 0.0

    async def stream() -> None:
        nonlocal ended
        await streamed(reader, watcher, "a", 5.0, "b", 1e5, "c")
        ended = asyncio.get_running_loop().time()

    run(stream())
    assert watcher.closed == 1
    assert reader.text == "a"
    assert ended == pytest.approx(5.0 + STALLED_READER_SECONDS, abs=1.0)


def test_a_stopped_server_says_so_on_its_streams() -> None:
    reader, watcher = Reader(), Watcher()

    async def stream() -> None:
        task = asyncio.create_task(streamed(reader, watcher, "a", 1e6))
        await asyncio.sleep(1.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(stream())
    assert watcher.closed == 1 and reader.is_ended
    assert reader.text == "a"  # `write` has no word for an end
    assert [text for _, _, text in reader.writes] == ["a", "", ""]
