"""Latest wins: a fast model is not slowed, a slow one is shown at once, leaving stops the work."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from serve.errors import RateLimited
from serve.service import Service
from serve.ui.answer import Answer
from serve.ui.pace import counted, watch
from serve.ui.page import create_page
from serve.ui.visit import Ticket, Visit
from serve.values import Event, Finished, TextDelta, Usage
from tests import jumping


async def tokens(count: int, pause: float = 0.0) -> AsyncGenerator[Event]:
    for _ in range(count):
        yield TextDelta("x")
        await asyncio.sleep(pause)
    yield Finished(Usage(1, count))


def test_ten_thousand_tokens_at_once_are_shown_in_a_few_pictures_and_not_slowed() -> None:
    async def run() -> tuple[int, float, Answer]:
        answer = Answer()
        began = time.monotonic()
        looks = 0
        async for _ in watch(tokens(10_000), answer):
            looks += 1
            await asyncio.sleep(0.05)  # a slow reader
        return looks, time.monotonic() - began, answer

    looks, seconds, answer = asyncio.run(run())
    assert looks < 40 and seconds < 3
    assert answer.text == "x" * 10_000 and answer.phase == "done"


def test_the_first_news_comes_at_once_and_the_rest_at_most_ten_times_a_second() -> None:
    async def run() -> list[float]:
        began = time.monotonic()
        times = []
        async for _ in watch(tokens(60, 0.01), Answer()):
            times.append(time.monotonic() - began)
        return times

    times = asyncio.run(run())
    assert times[0] < 0.08
    gaps = [b - a for a, b in zip(times, times[1:-1], strict=False)]
    assert min(gaps) > 0.09


def test_a_silent_model_gives_a_sign_of_life_every_second() -> None:
    async def silent() -> AsyncGenerator[Event]:
        await asyncio.sleep(2.5)
        yield Finished(Usage())

    async def run() -> int:
        return len([None async for _ in watch(silent(), Answer())])

    assert asyncio.run(run()) == 3


def test_leaving_early_closes_the_events() -> None:
    closed: list[bool] = []

    async def endless() -> AsyncGenerator[Event]:
        try:
            while True:
                yield TextDelta("x")
                await asyncio.sleep(0.01)
        finally:
            closed.append(True)

    async def run() -> None:
        async with contextlib.aclosing(watch(endless(), Answer())) as news:
            async for _ in news:
                break

    asyncio.run(run())
    assert closed == [True]


def test_an_error_of_the_producer_is_raised_not_lost() -> None:
    async def broken() -> AsyncGenerator[Event]:
        yield TextDelta("x")
        raise ZeroDivisionError

    async def run() -> None:
        async for _ in watch(broken(), Answer()):
            pass

    with pytest.raises(ZeroDivisionError):
        asyncio.run(run())


class Place:
    def __init__(self) -> None:
        self.seen: list[Event] = []
        self.is_closed = False

    def see(self, event: Event) -> None:
        self.seen.append(event)

    def close(self) -> None:
        self.is_closed = True


def test_events_are_spent_from_the_visitors_budget_and_the_place_is_given_back() -> None:
    place = Place()
    admit: Callable[[], Ticket] = lambda: place  # noqa: E731

    async def run() -> list[Event]:
        return [event async for event in counted(tokens(3), Visit(admit=admit))]

    assert asyncio.run(run()) == place.seen
    assert place.is_closed


def test_a_spent_budget_is_an_error_before_any_work() -> None:
    started: list[bool] = []

    async def work() -> AsyncGenerator[Event]:
        started.append(True)
        yield TextDelta("x")

    def refuse() -> Ticket:
        raise RateLimited("spent", retry_after=5)

    async def run() -> None:
        async for _ in watch(counted(work(), Visit(admit=refuse)), Answer()):
            pass

    with pytest.raises(RateLimited):
        asyncio.run(run())
    assert started == []


def test_an_idle_page_wakes_its_process_seldom() -> None:
    """Gradio's own pace is a thousand times a second, and each takes time from the engine."""
    queue = create_page(Service())._queue
    looks = 0

    class Queues(dict[str, Any]):
        def values(self) -> Any:
            nonlocal looks
            looks += 1
            return super().values()

    async def idle() -> None:
        queue.event_queue_per_concurrency_id = Queues()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(queue.start_processing(), 10.0)

    jumping.run(idle())
    assert 500 <= looks <= 1500
