"""Budgets: what is admitted, what must wait and how long, and that places are given back."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve.errors import RateLimited
from serve.limits import Budgets
from serve.settings import Settings
from serve.values import Accepted, Cancelled, Finished, TextDelta, Usage


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def budgets(clock: Clock, **limits: int) -> Budgets:
    settings = Settings(work_dir=Path("unused"), **limits)  # type: ignore[arg-type]
    return Budgets(settings, clock)


def test_without_limits_everything_is_admitted_and_no_header_claims_one() -> None:
    free = budgets(Clock())
    assert [free.admit("a").headers for _ in range(1000)] == [{}] * 1000


def test_requests_refill_steadily_and_the_wait_is_exact() -> None:
    clock = Clock()
    few = budgets(clock, rate_limit_requests=6)
    for _ in range(6):
        few.admit("a")
    with pytest.raises(RateLimited) as full:
        few.admit("a")
    assert full.value.retry_after == pytest.approx(10)
    clock.now += 9.9
    with pytest.raises(RateLimited):
        few.admit("a")
    clock.now += 0.2
    few.admit("a")
    few.admit("b")


def test_tokens_are_charged_as_they_come_and_set_right_at_the_end() -> None:
    clock = Clock()
    few = budgets(clock, rate_limit_tokens=100)
    ticket = few.admit("a")
    ticket.see(Accepted(30))
    ticket.see(TextDelta("several tokens in one delta"))
    ticket.see(Finished(Usage(30, 50)))
    ticket.close()
    assert few.admit("a").headers["x-ratelimit-remaining-tokens"] == "20"
    big = few.admit("a")
    big.see(Accepted(500))
    with pytest.raises(RateLimited) as spent:
        few.admit("a")
    assert spent.value.retry_after == pytest.approx(481 * 60 / 100)


def test_a_client_that_goes_away_has_paid_for_what_it_got() -> None:
    few = budgets(Clock(), rate_limit_tokens=100)
    ticket = few.admit("a")
    ticket.see(Accepted(10))
    for _ in range(20):
        ticket.see(TextDelta("x"))
    ticket.close()
    assert few.admit("a").headers["x-ratelimit-remaining-tokens"] == "70"
    late = few.admit("a")
    late.see(Cancelled(Usage(5, 5)))
    assert few.admit("a").headers["x-ratelimit-remaining-tokens"] == "60"


def test_requests_at_once_are_bounded_and_a_place_is_given_back_once() -> None:
    two = budgets(Clock(), rate_limit_concurrent=2)
    first, _ = two.admit("a"), two.admit("a")
    with pytest.raises(RateLimited):
        two.admit("a")
    first.close()
    first.close()
    two.admit("a")
    with pytest.raises(RateLimited):
        two.admit("a")


def test_idle_buckets_are_forgotten_running_ones_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.limits._MOST_BUCKETS", 10)
    one = budgets(Clock(), rate_limit_concurrent=1)
    one.admit("first")
    for i in range(100):
        one.admit(str(i)).close()
    with pytest.raises(RateLimited):
        one.admit("first")
