"""Counts bytes and tells how a transfer goes: one Progress shape for every source, and for the way
of weights into memory.

While a Meter is entered a small thread reports twice a second, so that silence is reported too, and
every ten seconds says so in the log. Knows no network. Used by the downloader, by sources that run
another program, and by loader.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from serve.values import Phase, Progress

log = logging.getLogger(__name__)

Report = Callable[[Progress], None]
TICK_SECONDS = 0.5
LOG_SECONDS = 10.0
WINDOW_SECONDS = 10.0


class Meter:
    def __init__(
        self,
        report: Report,
        candidate: str,
        source: str,
        total_bytes: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        phase: Phase = "downloading",
    ) -> None:
        self.total_bytes = total_bytes
        self.attempt = 1
        self.detail = ""
        self._report = report
        self._candidate = candidate
        self._source = source
        self._phase = phase
        self._clock = clock
        self._lock = threading.Lock()
        self._done = 0
        self._last_byte = clock()
        self._marks: deque[tuple[float, int]] = deque([(clock(), 0)])
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, count: int) -> None:
        """`count` bytes arrived (negative: were thrown away)."""
        with self._lock:
            self._done += count
            if count > 0:
                self._last_byte = self._clock()

    def found(self, count: int) -> None:
        """`count` bytes were there already: they are done, but say nothing about the speed."""
        with self._lock:
            self._done += count
            self._marks = deque((when, done + count) for when, done in self._marks)

    @property
    def done(self) -> int:
        return self._done

    def set_done(self, done: int) -> None:
        self.add(done - self._done)

    def reading(self) -> Progress:
        with self._lock:
            now = self._clock()
            while len(self._marks) > 1 and now - self._marks[0][0] > WINDOW_SECONDS:
                self._marks.popleft()
            since, before = self._marks[0]
            if now - self._marks[-1][0] >= TICK_SECONDS / 2:
                self._marks.append((now, self._done))
            speed = max(self._done - before, 0) / (now - since) if now - since > 0.2 else None
            left = None if self.total_bytes is None else max(self.total_bytes - self._done, 0)
            return Progress(
                phase=self._phase,
                candidate=self._candidate,
                source=self._source,
                done_bytes=self._done,
                total_bytes=self.total_bytes,
                bytes_per_second=speed,
                seconds_left=left / speed if speed and left is not None else None,
                stalled_seconds=now - self._last_byte,
                attempt=self.attempt,
                detail=self.detail,
            )

    def __enter__(self) -> Meter:
        self._report(self.reading())
        self._thread = threading.Thread(target=self._tick, name="download-progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._report(self.reading())

    def _tick(self) -> None:
        said = self._clock()
        while not self._stop.wait(TICK_SECONDS):
            reading = self.reading()
            self._report(reading)
            if self._clock() - said >= LOG_SECONDS:
                said = self._clock()
                log.info("%s", in_words(reading))


def in_words(reading: Progress) -> str:
    """One line: which model, what of it is there, how fast the rest comes."""
    parts = [gigabytes(reading.done_bytes or 0)]
    if reading.total_bytes:
        parts[0] += f" of {gigabytes(reading.total_bytes)}"
    if reading.bytes_per_second:
        parts.append(f"{reading.bytes_per_second / 1e6:.1f} MB/s")
    if reading.seconds_left is not None:
        parts.append(f"{reading.seconds_left:.0f} s left")
    if reading.attempt > 1:
        parts.append(f"attempt {reading.attempt}")
    if reading.detail:
        parts.append(reading.detail)
    return f"{reading.candidate} ({reading.source}), {reading.phase}: {', '.join(parts)}"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
