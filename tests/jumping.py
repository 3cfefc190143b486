"""Coroutines on a clock that jumps: what takes minutes takes no time, and always the same."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


class JumpingLoop(asyncio.SelectorEventLoop):
    """Where nothing is ready, its clock jumps to the next timer."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(self.Selector(self))

    def time(self) -> float:
        return self._now

    class Selector(selectors.SelectSelector):
        def __init__(self, loop: JumpingLoop) -> None:
            super().__init__()
            self._loop = loop

        def select(self, timeout: float | None = None) -> Any:
            assert timeout is not None, "it would wait for ever"
            self._loop._now += max(timeout, 0.0)
            return super().select(0)


def run(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        runner.run(work)
