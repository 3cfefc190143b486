"""An engine that plays a script: the same face and guarantees as engine.py, without a model.

For tests of the layers above, and for trying the page without weights. It takes a list of steps, or
a function from a request to steps, and plays them from its own thread per request. It can be slow,
fail at the start or in the middle, be full, or hang until cancelled; it keeps what was submitted
and cancelled. It honours end ids, stop_ids, ignore_eos, min_tokens, max_tokens and n as the real
one does, and knows no tensors.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from serve.engine.face import (
    Ended,
    EngineStats,
    GenerationRequest,
    Mailbox,
    Message,
    SequenceEnded,
    Tokens,
    TokenScore,
    Waiting,
)
from serve.errors import ContextLengthExceeded, EngineFailed, Overloaded, ServeError, Unavailable


@dataclass(frozen=True, slots=True)
class Say:
    """Ids for one choice (None: for every open choice), posted together as one Tokens."""

    ids: tuple[int, ...]
    choice: int | None = None
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True, slots=True)
class Hang:
    """Nothing more comes until the request is cancelled or the engine closed."""


HANG = Hang()

# A bare int is one id for every open choice, a float is a pause in seconds, an error ends the
# request as failed, Waiting is posted as it is. The script's end ends every open choice with
# "stop".
Step = int | float | Say | Hang | Waiting | ServeError
Script = Sequence[Step] | Callable[[GenerationRequest], Iterable[Step]]


@dataclass(slots=True)
class _Play:
    """One request being played."""

    request: GenerationRequest
    mailbox: Mailbox
    started: float
    open: set[int]
    counts: list[int]
    wake: threading.Event = field(default_factory=threading.Event)
    cancelled: set[int] = field(default_factory=set)
    whole: int = 0  # choices that came to their own end
    is_given_up: bool = False  # the whole request was cancelled, not choice by choice
    is_cut: bool = False  # a cancel ended it before its own end
    first_token: float = 0.0


class ScriptedEngine:
    """`refusal`, when set, is raised by submit; `capacity` is how many may run before Overloaded.

    `submitted` and `cancelled` are what was asked, in order; `running` counts unended requests.
    """

    def __init__(
        self,
        script: Script = (),
        *,
        eos_ids: Iterable[int] = (),
        context_length: int = 4096,
        capacity: int | None = None,
        refusal: ServeError | None = None,
        cached_tokens: int = 0,
    ) -> None:
        self.script = script
        self.eos_ids = frozenset(eos_ids)
        self.capacity = capacity
        self.refusal = refusal
        self.cached_tokens = cached_tokens
        self.submitted: list[GenerationRequest] = []
        self.cancelled: list[tuple[int, int | None]] = []
        self._context_length = context_length
        self._numbers = itertools.count(1)
        self._plays: dict[int, _Play] = {}
        self._lock = threading.Condition()
        self._is_closed = False

    @property
    def context_length(self) -> int:
        return self._context_length

    @property
    def running(self) -> int:
        with self._lock:
            return len(self._plays)

    def submit(self, request: GenerationRequest, mailbox: Mailbox) -> int:
        with self._lock:
            self._check(request)
            number = next(self._numbers)
            n = request.sampling.n
            play = _Play(request, mailbox, time.monotonic(), set(range(n)), [0] * n)
            self._plays[number] = play
            self.submitted.append(request)
        thread = threading.Thread(
            target=self._play, args=(number, play), name=f"scripted-engine-{number}", daemon=True
        )
        thread.start()
        return number

    def cancel(self, number: int, choice: int | None = None) -> None:
        with self._lock:
            self.cancelled.append((number, choice))
            play = self._plays.get(number)
            if play is None:
                return
            play.is_given_up |= choice is None
            play.cancelled |= set(range(len(play.counts))) if choice is None else {choice}
            play.wake.set()

    def stats(self) -> EngineStats:
        return EngineStats(running=self.running, is_alive=not self._is_closed)

    def close(self, drain_seconds: float = 0.0) -> None:
        with self._lock:
            self._is_closed = True
            self._lock.wait_for(lambda: not self._plays, drain_seconds)
            for play in self._plays.values():
                play.is_given_up = True
                play.cancelled |= set(range(len(play.counts)))
                play.wake.set()
            self._lock.wait_for(lambda: not self._plays, 5.0)

    def wait_until_idle(self, seconds: float = 5.0) -> bool:
        """True once nothing runs any more; False when that took longer than `seconds`."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._plays, seconds)

    # -- on the request's own thread --------------------------------------------------------------

    def _check(self, request: GenerationRequest) -> None:
        if self._is_closed:
            raise Unavailable("The engine is closed.", retry_after=5)
        if self.refusal is not None:
            raise self.refusal
        if self.capacity is not None and len(self._plays) >= self.capacity:
            raise Overloaded("Too many requests are waiting. Try again in 2 s.", retry_after=2.0)
        if len(request.prompt.ids) >= self._context_length:
            raise ContextLengthExceeded(
                f"The prompt has {len(request.prompt.ids)} tokens; "
                f"the context holds {self._context_length}.",
                param="messages",
            )

    def _play(self, number: int, play: _Play) -> None:
        # Stands when the script itself raises: that goes to the thread's hook, loudly.
        error: ServeError | None = EngineFailed("The script raised an exception.")
        try:
            error = self._perform(play)
        finally:
            self._end(number, play, error)

    def _perform(self, play: _Play) -> ServeError | None:
        script = self.script
        for step in script(play.request) if callable(script) else script:
            error = self._take(step, play)
            if error is not None or not play.open:
                return error
        self._apply_cancels(play)
        for choice in sorted(play.open):
            self._end_choice(choice, "stop", play, [])
        return None

    def _take(self, step: Step, play: _Play) -> ServeError | None:
        self._apply_cancels(play)
        if not play.open:
            return None
        if isinstance(step, ServeError):
            return step
        if isinstance(step, Hang):
            while play.open:
                self._pause(play, None)
        elif isinstance(step, float):
            until = time.monotonic() + step
            while play.open and (left := until - time.monotonic()) > 0:
                self._pause(play, left)
        elif isinstance(step, Waiting):
            play.mailbox.post([step])
        else:
            self._say(step if isinstance(step, Say) else Say((step,)), play)
        return None

    def _pause(self, play: _Play, seconds: float | None) -> None:
        play.wake.wait(seconds)
        play.wake.clear()
        self._apply_cancels(play)

    def _apply_cancels(self, play: _Play) -> None:
        with self._lock:
            cut = play.open & play.cancelled
            play.open -= cut
            play.is_cut |= bool(cut) and not play.open and (play.is_given_up or not play.whole)

    def _say(self, say: Say, play: _Play) -> None:
        for choice in sorted(play.open) if say.choice is None else [say.choice]:
            if choice not in play.open:
                continue
            ids, reason = self._cut(say.ids, choice, play)
            scores = say.scores[: len(ids)] or _made_up_scores(ids, play.request)
            play.counts[choice] += len(ids)
            play.first_token = play.first_token or time.monotonic() - play.started
            tokens = Tokens(ids, choice, scores)
            if reason is None:
                play.mailbox.post([tokens])
            else:
                self._end_choice(choice, reason, play, [tokens])

    def _cut(
        self, ids: tuple[int, ...], choice: int, play: _Play
    ) -> tuple[tuple[int, ...], Literal["stop", "length"] | None]:
        """The ids up to the one that ends the choice, and why it ends there (None: it goes on)."""
        sampling = play.request.sampling
        room = self._context_length - len(play.request.prompt.ids)
        limit = room if sampling.max_tokens is None else min(room, sampling.max_tokens)
        ends = play.request.stop_ids | frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends |= self.eos_ids
        for i, token in enumerate(ids, start=1):
            count = play.counts[choice] + i
            if token in ends and count > sampling.min_tokens:
                return ids[:i], "stop"
            if count >= limit:
                return ids[:i], "length"
        return ids, None

    @staticmethod
    def _end_choice(
        choice: int, reason: Literal["stop", "length"], play: _Play, before: list[Message]
    ) -> None:
        play.open.discard(choice)
        play.whole += 1
        play.mailbox.post([*before, SequenceEnded(reason, choice)])

    def _end(self, number: int, play: _Play, error: ServeError | None) -> None:
        ended = Ended(
            "failed" if error is not None else "cancelled" if play.is_cut else "finished",
            error,
            prompt_tokens=len(play.request.prompt.ids),
            cached_tokens=self.cached_tokens,
            completion_tokens=sum(play.counts),
            first_token_seconds=play.first_token,
            total_seconds=time.monotonic() - play.started,
        )
        with self._lock:
            del self._plays[number]
            self._lock.notify_all()
        play.mailbox.post([ended])


def _made_up_scores(ids: Sequence[int], request: GenerationRequest) -> tuple[TokenScore, ...]:
    """Plausible log probabilities where the request asks for them: the drawn id leads."""
    asked = request.sampling.logprobs
    if asked is None:
        return ()
    return tuple(
        TokenScore(-0.25, tuple((token + i, -0.25 - i) for i in range(asked))) for token in ids
    )
