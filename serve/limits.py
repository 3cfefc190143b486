"""Budgets: requests and tokens a minute, and requests at once, per key.

Token buckets that refill steadily; a caller is told how long until there is room. Counts what was
asked at the start and what was generated as it comes. Knows no keys and no HTTP. Used by
openai_compat.py; the page shares the same object, so its visitors and their guest keys share one
budget.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from serve.errors import RateLimited
from serve.settings import Settings
from serve.values import (
    Accepted,
    Cancelled,
    Event,
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
)

_MOST_BUCKETS = 10_000


@dataclass(slots=True)
class _Level:
    """What is left of `size` a minute, at a moment of the monotonic clock."""

    size: int
    left: float
    at: float

    def refill(self, now: float) -> None:
        self.left = min(self.size, self.left + (now - self.at) * self.size / 60)
        self.at = now

    def seconds_until(self, wanted: float) -> float:
        return max(0.0, (wanted - self.left) * 60 / self.size)


@dataclass(slots=True)
class _Bucket:
    requests: _Level | None
    tokens: _Level | None
    running: int = 0


@dataclass(slots=True)
class Ticket:
    """One admitted request; sees its events, gives its place back at `close`."""

    bucket: _Bucket
    headers: dict[str, str] = field(default_factory=dict)
    _spent: int = 0
    _is_closed: bool = False

    def see(self, event: Event) -> None:
        match event:
            case Accepted():
                self._spend(event.prompt_tokens)
            case TextDelta() | ReasoningDelta() | ToolCallDelta():
                self._spend(1)
            case Finished() | Cancelled():
                used = event.usage.prompt_tokens + event.usage.completion_tokens
                self._spend(max(used - self._spent, 0))

    def _spend(self, tokens: int) -> None:
        self._spent += tokens
        if self.bucket.tokens is not None:
            self.bucket.tokens.left -= tokens

    def close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self.bucket.running -= 1


class Budgets:
    """All buckets of one process. Used on the event loop only."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._requests = settings.rate_limit_requests
        self._tokens = settings.rate_limit_tokens
        self._concurrent = settings.rate_limit_concurrent
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def admit(self, name: str) -> Ticket:
        """Take one request's place in bucket `name`. Raises RateLimited with how long to wait."""
        now = self._clock()
        bucket = self._bucket(name, now)
        for level in (bucket.requests, bucket.tokens):
            if level is not None:
                level.refill(now)
        self._check(bucket)
        if bucket.requests is not None:
            bucket.requests.left -= 1
        bucket.running += 1
        return Ticket(bucket, _headers(bucket))

    def _check(self, bucket: _Bucket) -> None:
        if self._concurrent and bucket.running >= self._concurrent:
            raise RateLimited(
                f"This key has {bucket.running} requests running; {self._concurrent} may run at "
                "once. Wait for one to end.",
                retry_after=1,
            )
        for level, what in ((bucket.requests, "requests"), (bucket.tokens, "tokens")):
            wait = 0.0 if level is None else level.seconds_until(1)
            if level is not None and wait > 0:
                raise RateLimited(
                    f"This key's {level.size:,} {what} a minute are spent. Try again in "
                    f"{wait:.0f} s.",
                    retry_after=wait,
                )

    def _bucket(self, name: str, now: float) -> _Bucket:
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = _Bucket(
                _Level(self._requests, self._requests, now) if self._requests else None,
                _Level(self._tokens, self._tokens, now) if self._tokens else None,
            )
            self._buckets[name] = bucket
            self._forget_idle()
        self._buckets.move_to_end(name)
        return bucket

    def _forget_idle(self) -> None:
        """Oldest first; whoever is running something is kept."""
        while len(self._buckets) > _MOST_BUCKETS:
            name, bucket = next(iter(self._buckets.items()))
            if bucket.running:
                return
            del self._buckets[name]


def _headers(bucket: _Bucket) -> dict[str, str]:
    found: dict[str, str] = {}
    for level, what in ((bucket.requests, "requests"), (bucket.tokens, "tokens")):
        if level is not None:
            found[f"x-ratelimit-limit-{what}"] = str(level.size)
            found[f"x-ratelimit-remaining-{what}"] = str(max(0, int(level.left)))
            found[f"x-ratelimit-reset-{what}"] = f"{level.seconds_until(level.size):.1f}s"
    return found
