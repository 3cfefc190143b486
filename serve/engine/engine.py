"""The engine: one thread that owns the model, and the promise of one end per request.

Any thread may submit and cancel; both only leave a note in the inbox. The thread reads the inbox,
lets the scheduler choose, runs the model once, hands each drawn id to its request's mailbox, and
does it again. Where the runner can, a step of decodes is begun before the ids of the one before are
read: then what an id decides (an end, above all) shows one step late, and what was drawn for an
ended choice is discarded. Whatever goes wrong in a step ends the requests of that step with a clear
error and nothing else. Knows no text, no roles and no HTTP; made by create_engine for app.py.
"""

from __future__ import annotations

import itertools
import logging
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from serve.engine.cache import KVCache
from serve.engine.config import EngineConfig
from serve.engine.demand import Line, Rate
from serve.engine.face import EngineStats, GenerationRequest, Mailbox, Waiting
from serve.engine.faults import is_out_of_memory, public
from serve.engine.runner import (
    Launched,
    Runner,
    Shifts,
    StepInputs,
    create_runner,
    fitted,
    no_shifts,
    token_inputs,
)
from serve.engine.sampling import Draw, mix
from serve.engine.scheduler import Chunk, Scheduler
from serve.engine.sequence import Request, Status
from serve.engine.validation import check_request
from serve.errors import EngineFailed, Overloaded, ServeError, Unavailable

log = logging.getLogger(__name__)

TELL_WAITING_SECONDS = 1.0
SWITCH_SECONDS = 0.0005

# Chunks that were computed, each with what it drew, if it draws.
Drawn = list[tuple[Chunk, Draw | None]]


@dataclass(frozen=True, slots=True)
class _Cancel:
    number: int
    choice: int | None


class PagedEngine:
    """serve.engine.face.Engine on a paged cache. `runs_ahead` may be changed at any time."""

    def __init__(
        self,
        runner: Runner,
        cache: KVCache,
        config: EngineConfig,
        *,
        eos_ids: frozenset[int],
        context_length: int,
        vocabulary: int,
    ) -> None:
        self._runner = runner
        self._scheduler = Scheduler(cache, config.max_running, config.prefill_chunk)
        self._config = config
        self._eos_ids = eos_ids
        self._context_length = context_length
        self._vocabulary = vocabulary
        self._numbers = itertools.count(1)
        self._seeds = random.SystemRandom()
        self._requests: dict[int, Request] = {}
        self._touched: dict[int, Request] = {}
        self._lock = threading.Condition()
        self._inbox: deque[Request | _Cancel] = deque()
        self._line = Line()
        self.runs_ahead = config.runs_ahead
        self._delivers_beside = runner.beside(self._deliver)
        self._launched: Launched | None = None
        self._is_closing = False
        self._is_stopped = False
        self._step_began = 0.0
        self._rate = Rate()
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    def start(self) -> PagedEngine:
        # A step lets go of the interpreter's lock hundreds of times and would wait up to 5 ms each
        # time for the server's thread to give it back: measured, a third of one stream's rate.
        sys.setswitchinterval(SWITCH_SECONDS)
        self._thread.start()
        return self

    # -- for any thread ----------------------------------------------------------------------------

    @property
    def context_length(self) -> int:
        return self._context_length

    def submit(self, request: GenerationRequest, mailbox: Mailbox) -> int:
        check_request(request, self._vocabulary, self._context_length)
        made = self._make(request, mailbox)
        with self._lock:
            if self._is_closing or self._is_stopped:
                raise Unavailable("The engine is shutting down. Try again later.", retry_after=10)
            self._line.check(made, self._config)
            self._line.enter(made)
            self._inbox.append(made)
            self._lock.notify_all()
        return made.number

    def cancel(self, number: int, choice: int | None = None) -> None:
        with self._lock:
            self._inbox.append(_Cancel(number, choice))
            self._lock.notify_all()

    def stats(self) -> EngineStats:
        began, cache = self._step_began, self._scheduler.cache
        return EngineStats(
            running=len(self._scheduler.running),
            waiting=self._line.requests,
            kv_blocks_total=cache.total_blocks,
            kv_blocks_free=cache.free_blocks,
            tokens_per_second=self._rate.value(time.monotonic()),
            last_step_age_seconds=time.monotonic() - began if began else 0.0,
            is_alive=self._thread.is_alive() and not self._is_stopped,
            preemptions=self._scheduler.preemptions,
        )

    def close(self, drain_seconds: float = 0.0) -> None:
        until = time.monotonic() + drain_seconds
        with self._lock:
            self._is_closing = True
            self._lock.notify_all()
            self._lock.wait_for(lambda: self._is_stopped, max(0.0, until - time.monotonic()))
            self._is_stopped = True
            self._lock.notify_all()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=30.0)

    # -- the engine's thread -----------------------------------------------------------------------

    def step(self) -> None:
        """Read the inbox, schedule, run, advance, deliver (or have the next run do it beside its
        work). A launched step is read by the next call, which launches its own first if it can."""
        self._read_inbox()
        before = self._launched
        chunks = self._scheduler.ahead(before.chunks) if before else self._scheduler.schedule()
        self._launched = self._launch(chunks, before)
        if before is not None:
            self._advance(self._take(before))
        elif chunks and self._launched is None:
            self._advance(self._run(chunks))
        if not (self._delivers_beside and chunks and self._scheduler.has_work):
            self._deliver()

    def _loop(self) -> None:
        self._runner.prepare(self._config.threads)
        while self._wait_for_work():
            self._step_began = time.monotonic()
            try:
                self.step()
            except Exception as error:  # the engine's boundary: the step's requests fail, no others
                log.exception("A step of the engine failed")
                self._fail_all(error)
            finally:
                self._step_began = 0.0
        self._cancel_everything()

    def _wait_for_work(self) -> bool:
        """False when the thread is to end."""
        with self._lock:
            while not self._is_stopped:
                if self._inbox or self._launched or self._scheduler.has_work:
                    return True
                if self._is_closing:
                    self._is_stopped = True
                    self._lock.notify_all()
                    return False
                self._scheduler.check()
                self._lock.wait()
            return False

    def _read_inbox(self) -> None:
        with self._lock:
            notes = list(self._inbox)
            self._inbox.clear()
        for note in notes:
            if isinstance(note, Request):
                self._begin(note)
            elif (request := self._requests.get(note.number)) is not None:
                self._cancel(request, note.choice)
        self._expire()

    def _begin(self, request: Request) -> None:
        self._requests[request.number] = request
        grammar = request.generation.grammar
        try:
            for sequence in request.sequences if grammar is not None else ():
                sequence.matcher = grammar.matcher()  # type: ignore[union-attr]
        except Exception as error:  # a grammar is the caller's: it fails its own request only
            log.exception("A grammar did not start")
            self._end(request, public(error))
            return
        self._scheduler.add(request)

    def _launch(self, chunks: list[Chunk], before: Launched | None) -> Launched | None:
        if not chunks or not self.runs_ahead:
            return None
        try:
            return self._runner.launch(chunks, before)
        except Exception:  # it runs again, waited for: what is wrong shows there and is handled
            log.exception("A step could not be launched; it will be run")
            return None

    def _take(self, launched: Launched) -> Drawn:
        """What a launched step drew for those that have not ended since."""
        try:
            drawn = zip(launched.chunks, self._runner.take(launched), strict=True)
        except Exception as error:  # the engine's boundary, as below
            return self._fail_chunks(list(filter(_is_running, launched.chunks)), error)
        done: Drawn = [(chunk, draw) for chunk, draw in drawn if _is_running(chunk)]
        for chunk, _ in done:
            self._scheduler.computed(chunk)
        return done

    def _run(self, chunks: list[Chunk]) -> Drawn:
        """Run the chunks. A step that fails ends its own requests; one that has no memory is halved
        once first."""
        try:
            return self._run_once(chunks)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                return self._fail_chunks(chunks, error)
            return self._run_half(chunks)
        except Exception as error:  # the engine's boundary, as above
            return self._fail_chunks(chunks, error)

    def _run_once(self, chunks: list[Chunk]) -> Drawn:
        draws = iter(self._runner.run(chunks))
        done = [(chunk, next(draws) if chunk.draws else None) for chunk in chunks]
        for chunk in chunks:
            self._scheduler.computed(chunk)
        return done

    def _run_half(self, chunks: list[Chunk]) -> Drawn:
        self._runner.free_memory()
        chunks = sorted(chunks, key=lambda chunk: chunk.sequence.age)
        half = sorted(chunks[: max(len(chunks) // 2, 1)], key=lambda chunk: chunk.count)
        log.warning("Out of memory with %d sequences; trying %d", len(chunks), len(half))
        for chunk in chunks[len(half) :]:
            self._scheduler.preempt(chunk.sequence)
        try:
            return self._run_once(half)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                return self._fail_chunks(half, error)
            self._runner.free_memory()
            largest = max(half, key=lambda chunk: (chunk.count, chunk.end))
            return self._fail_chunks([largest], error)

    def _fail_chunks(self, chunks: list[Chunk], error: BaseException) -> Drawn:
        log.error("A step of %d sequences failed", len(chunks), exc_info=error)
        for request in {chunk.sequence.request.number: chunk.sequence.request for chunk in chunks}:
            self._end(self._requests[request], public(error))
        return []

    def _advance(self, done: Drawn) -> None:
        now = time.monotonic()
        self._rate.add(now, sum(draw is not None for _, draw in done))
        for chunk, draw in done:
            sequence = chunk.sequence
            if draw is None or sequence.status is Status.ENDED:
                continue
            request = sequence.request
            if draw.problem is not None:
                self._end(request, EngineFailed(draw.problem))
                continue
            self._touched[request.number] = request
            try:
                sequence.append(draw.token, draw.score, now)
            except Exception as error:  # its grammar refused the id it had allowed
                log.exception("A grammar did not accept an id")
                self._end(request, public(error))
                continue
            if sequence.reason is not None:
                self._scheduler.drop(sequence)
                self._end_if_complete(request)

    def _deliver(self) -> None:
        for request in self._touched.values():
            if request.outbox:
                messages, request.outbox = request.outbox, []
                request.mailbox.post(messages)
        self._touched.clear()

    # -- ends --------------------------------------------------------------------------------------

    def _cancel(self, request: Request, choice: int | None) -> None:
        for sequence in request.sequences:
            if choice in (None, sequence.choice) and sequence.status is not Status.ENDED:
                request.is_cancelled |= choice is None
                self._scheduler.drop(sequence)
        self._end_if_complete(request)

    def _end_if_complete(self, request: Request) -> None:
        if all(sequence.status is Status.ENDED for sequence in request.sequences):
            self._end(request, None)

    def _end(self, request: Request, error: ServeError | None) -> None:
        if request.is_ended:
            return
        request.is_ended = True
        for sequence in request.sequences:
            if sequence.status is not Status.ENDED:
                self._scheduler.drop(sequence)
        self._line.leave(request)
        del self._requests[request.number]
        request.outbox.append(request.ended(error, time.monotonic()))
        self._touched[request.number] = request

    def _fail_all(self, error: Exception) -> None:
        """Something outside the model's run broke: nothing that runs can be trusted."""
        self._launched = None
        for request in list(self._requests.values()):
            self._end(request, public(error))
        self._deliver()

    def _cancel_everything(self) -> None:
        self._read_inbox()
        for request in list(self._requests.values()):
            self._cancel(request, None)
        self._deliver()
        with self._lock:
            self._is_stopped = True
            self._lock.notify_all()

    # -- the queue ---------------------------------------------------------------------------------

    def _make(self, request: GenerationRequest, mailbox: Mailbox) -> Request:
        room = self._context_length - len(request.prompt.ids)
        seed = request.sampling.seed
        seed = self._seeds.getrandbits(64) if seed is None else seed % 2**64
        return Request.create(next(self._numbers), request, mailbox, room, self._eos_ids, mix(seed))

    def _expire(self) -> None:
        """Tell those who wait their place; end those who waited too long."""
        now, timeout = time.monotonic(), self._config.queue_timeout
        for sequence in self._scheduler.running:
            self._line.leave(sequence.request)
        if now < self._line.told_at + TELL_WAITING_SECONDS:
            return
        self._line.told_at = now
        for ahead, sequence in enumerate(list(self._scheduler.waiting)):
            request = sequence.request
            if timeout is not None and now - request.arrived > timeout:
                waited = f"It waited {timeout:.0f} s for its turn."
                self._end(request, Overloaded(waited, retry_after=timeout))
            elif request.told_ahead != ahead:
                request.told_ahead = ahead
                request.outbox.append(Waiting(ahead, self._line.wait_seconds(ahead)))
                self._touched[request.number] = request


def _is_running(chunk: Chunk) -> bool:
    return chunk.sequence.status is Status.RUNNING


def create_engine(
    model: Any,
    *,
    eos_ids: Iterable[int],
    context_length: int,
    device: Any,
    inputs: StepInputs = token_inputs,
    shifts: Shifts = no_shifts,
    config: EngineConfig | None = None,
) -> PagedEngine:
    """An engine that runs `model`, a stock transformers model in eval mode on `device`; its thread
    is started. The context may be shortened to what the cache holds (`engine.context_length`)."""
    config = fitted(config or EngineConfig(), device)
    runner, cache, context_length = create_runner(
        model, device, context_length=context_length, config=config, inputs=inputs, shifts=shifts
    )
    return PagedEngine(
        runner,
        cache,
        config,
        eos_ids=frozenset(eos_ids),
        context_length=context_length,
        vocabulary=runner.vocabulary,
    ).start()
