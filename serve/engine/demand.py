"""How much is asked of the engine: who waits, how fast the line moves, how many ids a second come.

Small books without torch, kept by engine.py: submitters enter the line under the engine's lock, the
engine's thread takes them off it.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

from serve.engine.config import EngineConfig
from serve.engine.sequence import Request
from serve.errors import Overloaded

RATE_WINDOW_SECONDS = 10.0


@dataclass(slots=True)
class Line:
    """Who waits for a first step, and how fast the line moved lately. Changed by submitters under
    the engine's lock (enter) and by the engine's thread (leave)."""

    entered: dict[int, int] = field(default_factory=dict)  # request number -> prompt tokens
    tokens: int = 0
    left_at: deque[float] = field(default_factory=lambda: deque(maxlen=32))
    told_at: float = 0.0

    @property
    def requests(self) -> int:
        return len(self.entered)

    def enter(self, request: Request) -> None:
        self.entered[request.number] = request.prompt_length
        self.tokens += request.prompt_length

    def leave(self, request: Request) -> None:
        tokens = self.entered.pop(request.number, None)
        if tokens is not None:
            self.tokens -= tokens
            self.left_at.append(time.monotonic())

    def check(self, request: Request, config: EngineConfig) -> None:
        """Raises Overloaded when the request would make the line too long; a lone request is never
        too much."""
        is_full = self.requests >= config.max_waiting
        is_much = self.tokens + request.prompt_length > config.max_waiting_tokens
        if not self.requests or not (is_full or is_much):
            return
        wait = self.wait_seconds(self.requests)
        wait = 10.0 if wait is None else min(max(wait, 1.0), 600.0)
        raise Overloaded(
            f"{self.requests} requests are waiting already. Try again in {wait:.0f} s.",
            retry_after=wait,
        )

    def wait_seconds(self, ahead: int) -> float | None:
        """Until `ahead` others have left, at the pace of the last ones; None before two left."""
        if len(self.left_at) < 2:
            return None
        elapsed = time.monotonic() - self.left_at[0]
        return (ahead + 1) * elapsed / len(self.left_at)


@dataclass(slots=True)
class Rate:
    """Ids a second over the last seconds."""

    counts: deque[tuple[float, int]] = field(default_factory=deque)
    total: int = 0

    def add(self, now: float, count: int) -> None:
        self.counts.append((now, count))
        self.total += count
        while self.counts and self.counts[0][0] < now - RATE_WINDOW_SECONDS:
            self.total -= self.counts.popleft()[1]

    def value(self, now: float) -> float:
        recent = [count for at, count in list(self.counts) if at >= now - RATE_WINDOW_SECONDS]
        return sum(recent) / RATE_WINDOW_SECONDS
