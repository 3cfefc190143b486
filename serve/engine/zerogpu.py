"""The engine's face where a GPU is lent for one request at a time (Hugging Face's ZeroGPU).

There the parent process never owns a GPU: a decorated sync generator is run in a forked worker,
which may be new or reused, with everything pickled on the way. So the model waits in the parent,
each worker builds its own engine around it on its first request, and this class only carries one
request's messages over, keeping the face's promises (one Ended, cancel, no waiting forever).
No continuous batching happens here: the platform gives each request a turn. Knows no gradio; the
decorator and the request's context are passed in. Made by app.py.
"""

from __future__ import annotations

import contextvars
import itertools
import logging
import pickle
import re
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any

from serve.engine.face import (
    Ended,
    Engine,
    EngineStats,
    GenerationRequest,
    Mailbox,
    Message,
    SequenceEnded,
    Tokens,
)
from serve.engine.validation import check_request
from serve.errors import (
    EngineFailed,
    Overloaded,
    RateLimited,
    ServeError,
    Unavailable,
    Unsupported,
)

log = logging.getLogger(__name__)

GATHER_SECONDS = 0.05
MOST_SECONDS = 120
STARTING_SECONDS = 20
TOKENS_PER_SECOND = 30

Task = Callable[[GenerationRequest], Generator[list[Message], None, None]]
Decorate = Callable[[Task], Task]


def duration(request: GenerationRequest) -> int:
    """Seconds of a GPU to ask for: the visitor's quota pays for what is asked, not what is used."""
    tokens = (request.sampling.max_tokens or 1024) * max(request.sampling.n, 1)
    return min(STARTING_SECONDS + tokens // TOKENS_PER_SECOND, MOST_SECONDS)


def worker_task(build: Callable[[], Engine]) -> Task:
    """What runs in the worker: its engine is built once and kept for the worker's life."""
    kept: list[Engine] = []

    def generate(request: GenerationRequest) -> Generator[list[Message], None, None]:
        if not kept:
            kept.append(build())
        arrived: SimpleQueue[Message] = SimpleQueue()
        number = kept[0].submit(request, _Post(arrived))
        try:
            while True:
                messages = _gathered(arrived)
                yield messages
                if messages and isinstance(messages[-1], Ended):
                    return
        finally:
            kept[0].cancel(number)

    return generate


@dataclass(frozen=True, slots=True)
class _Post:
    arrived: SimpleQueue[Message]

    def post(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self.arrived.put(message)


def _gathered(arrived: SimpleQueue[Message]) -> list[Message]:
    """What came within a moment: each yield crosses a pipe, so tokens travel together."""
    found: list[Message] = []
    end = time.monotonic() + GATHER_SECONDS
    while not (found and isinstance(found[-1], Ended)):
        try:
            found.append(arrived.get(timeout=max(end - time.monotonic(), 0.001)))
        except Empty:
            break
    return found


@dataclass(slots=True)
class _Turn:
    """One request on its way, in the parent."""

    request: GenerationRequest
    mailbox: Mailbox
    context: contextvars.Context
    began: float = field(default_factory=time.monotonic)
    first_token: float = 0.0
    completion_tokens: int = 0
    cancelled: set[int] = field(default_factory=set)
    is_running: bool = False

    @property
    def is_over(self) -> bool:
        return len(self.cancelled) >= self.request.sampling.n


class PerRequestEngine:
    """serve.engine.face.Engine over a decorated generator.

    `task` is `decorate(worker_task(build))`; `most` requests may be on their way at once.
    """

    def __init__(self, task: Task, *, vocabulary: int, context_length: int, most: int = 16) -> None:
        self._task = task
        self._vocabulary = vocabulary
        self._context_length = context_length
        self._most = most
        self._numbers = itertools.count(1)
        self._turns: dict[int, _Turn] = {}
        self._lock = threading.Condition()
        self._is_closing = False

    @property
    def context_length(self) -> int:
        return self._context_length

    def submit(self, request: GenerationRequest, mailbox: Mailbox) -> int:
        check_request(request, self._vocabulary, self._context_length)
        _check_portable(request)
        # The visitor's token travels in the caller's context, which the scheduler reads.
        turn = _Turn(request, mailbox, contextvars.copy_context())
        with self._lock:
            if self._is_closing:
                raise Unavailable("The engine is shutting down. Try again later.", retry_after=10)
            if len(self._turns) >= self._most:
                raise Overloaded("Too many requests are waiting for a GPU.", retry_after=10)
            number = next(self._numbers)
            self._turns[number] = turn
        name = f"zerogpu-{number}"
        threading.Thread(target=self._follow, args=(number, turn), name=name, daemon=True).start()
        return number

    def cancel(self, number: int, choice: int | None = None) -> None:
        with self._lock:
            turn = self._turns.get(number)
            if turn is not None:
                all_choices = range(turn.request.sampling.n)
                turn.cancelled.update(all_choices if choice is None else (choice,))

    def stats(self) -> EngineStats:
        with self._lock:
            running = sum(turn.is_running for turn in self._turns.values())
            waiting = len(self._turns) - running
            return EngineStats(running=running, waiting=waiting, is_alive=not self._is_closing)

    def close(self, drain_seconds: float = 0.0) -> None:
        with self._lock:
            self._is_closing = True
            self._lock.wait_for(lambda: not self._turns, drain_seconds)
            for turn in self._turns.values():
                turn.cancelled.update(range(turn.request.sampling.n))

    # -- one request's thread ----------------------------------------------------------------------

    def _follow(self, number: int, turn: _Turn) -> None:
        try:
            ended = turn.context.run(self._run, turn)
        except ServeError as error:
            ended = Ended("failed", error)
        except Exception as error:  # the engine's boundary: the platform raises what it likes
            log.warning("ZeroGPU ended a request: %s: %s", type(error).__name__, error)
            ended = Ended("failed", public(error))
        with self._lock:
            del self._turns[number]
            self._lock.notify_all()
        turn.mailbox.post((self._complete(ended, turn),))

    def _run(self, turn: _Turn) -> Ended:
        if turn.is_over:
            return Ended("cancelled")
        messages = self._task(turn.request)
        try:
            for batch in messages:
                turn.is_running = True
                if turn.is_over:
                    return Ended("cancelled")
                ended = self._pass_on(batch, turn)
                if ended is not None:
                    return ended
        finally:
            messages.close()
        return Ended("failed", EngineFailed("The worker ended without finishing the answer."))

    def _pass_on(self, batch: Sequence[Message], turn: _Turn) -> Ended | None:
        passed: list[Message] = []
        for message in batch:
            if isinstance(message, Ended):
                if passed:
                    turn.mailbox.post(passed)
                return message
            if isinstance(message, Tokens | SequenceEnded) and message.choice in turn.cancelled:
                continue
            if isinstance(message, Tokens):
                turn.completion_tokens += len(message.ids)
                turn.first_token = turn.first_token or time.monotonic()
            passed.append(message)
        if passed:
            turn.mailbox.post(passed)
        return None

    def _complete(self, ended: Ended, turn: _Turn) -> Ended:
        """Counts and times as the caller saw them: the wait for a GPU is part of them."""
        first = turn.first_token - turn.began if turn.first_token else 0.0
        return replace(
            ended,
            prompt_tokens=len(turn.request.prompt.ids),
            completion_tokens=turn.completion_tokens,
            first_token_seconds=first,
            total_seconds=time.monotonic() - turn.began,
        )


def _check_portable(request: GenerationRequest) -> None:
    if request.grammar is None:
        return
    try:
        pickle.dumps(request.grammar)
    except (TypeError, AttributeError, pickle.PicklingError):
        raise Unsupported(
            "On ZeroGPU an answer cannot be bound to a schema or a forced tool call: the grammar "
            "does not reach the GPU's process.",
            param="response_format",
        ) from None


def public(error: Any) -> ServeError:
    """The platform's refusals as errors for the caller: quota 429, no GPU 503."""
    said = f"{getattr(error, 'title', '')} {error}".lower()
    if "quota" in said or "credits" in said or "runs limit" in said:
        return RateLimited(
            "The ZeroGPU quota of this caller is spent. Sign in to Hugging Face, or send your "
            "Hugging Face token as Authorization and this app's key as X-API-Key.",
            retry_after=_wait_seconds(said),
        )
    if "illegal duration" in said:
        return Unavailable("The answer would need a GPU for longer than ZeroGPU lends one. Lower "
                           "max_tokens.", param="max_tokens")  # fmt: skip
    if "no gpu" in said or "queue timeout" in said or "aborted" in said or "token" in said:
        return Unavailable("ZeroGPU has no GPU free at present. Try again.", retry_after=30)
    return EngineFailed("The GPU's process failed on this request.")


def _wait_seconds(said: str) -> float:
    """ZeroGPU words its wait as "try again in 1:02:03"."""
    found = re.search(r"try again in (?:(\d+) days?, )?(\d+):(\d\d):(\d\d)", said)
    if found is None:
        return 60.0
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
