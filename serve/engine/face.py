"""The engine's face: what a caller hands in, what comes back, and the contract between them.

The engine sees token ids and input tensors; it knows no roles, channels, text or JSON. One thread
owns the model; `submit` and `cancel` may be called from any thread. Whoever submits gives a
Mailbox; it is registered before the request can run, and receives exactly one Ended, after which
nothing comes. Used by service.py; served by engine.py, by the per-request mode for ZeroGPU, and by
scripted.py in tests.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Lock
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary, ref

from serve.errors import ServeError
from serve.values import Sampling


class Matcher(Protocol):
    """One sequence's place in a grammar. Not thread-safe; the engine's thread uses it."""

    def fill(self, bitmask: Any, row: int) -> bool:
        """Write which ids may come next into row `row` of an int32 numpy array
        [rows, ceil(vocabulary / 32)], bit id % 32 of word id // 32; False: nothing is restricted
        now (the row is left as it was)."""
        ...

    def accept(self, token: int) -> None:
        """Move on by one drawn id."""
        ...

    def is_finished(self) -> bool:
        """True when nothing but an end may follow."""
        ...


class Grammar(Protocol):
    """A compiled grammar; `matcher` starts a new sequence (each of n choices has its own)."""

    def matcher(self) -> Matcher: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and for a model that sees, what else its forward needs.

    `inputs` is opaque here (made by formats/images.py, read by the runner); `salt` separates
    prefix-cache entries whose ids are equal but whose inputs differ, and each of `salts` does so
    from its position on (where a picture begins, and a hash of its pixels).
    """

    ids: tuple[int, ...]
    inputs: Mapping[str, Any] | None = None
    salt: bytes = b""
    salts: tuple[tuple[int, bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """`stop_ids` end the sequence besides the model's own end ids; the ending id is delivered too.

    `sampling.stop` (strings) is not the engine's: whoever decodes the text cancels the rest.
    `tenant` is the fairness turn and the prefix cache's salt.
    """

    prompt: Prompt
    sampling: Sampling = field(default_factory=Sampling)
    tenant: str = ""
    stop_ids: frozenset[int] = frozenset()
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class TokenScore:
    """log p of the drawn token and of the best alternatives, of the distribution sampled from."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Waiting:
    """Sent while the request is queued, when its place changes."""

    ahead: int
    wait_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Tokens:
    """New ids of one choice, oldest first; `scores` matches ids when logprobs were asked, else
    ()."""

    ids: tuple[int, ...]
    choice: int = 0
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceEnded:
    """One choice is complete: "stop" by an end id or a finished grammar, "length" by max_tokens or
    context."""

    reason: Literal["stop", "length"]
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """The one terminal message. `error` is set for "failed" only. Seconds are since submit."""

    outcome: Literal["finished", "failed", "cancelled"]
    error: ServeError | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0


Message = Waiting | Tokens | SequenceEnded | Ended


class Mailbox(Protocol):
    def post(self, messages: Sequence[Message]) -> None:
        """Called on the engine's thread, at most once a step and request. Must not block."""
        ...


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One glance at the engine. `last_step_age_seconds` grows while a step hangs; it is 0 when
    idle."""

    running: int = 0
    waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    tokens_per_second: float = 0.0
    last_step_age_seconds: float = 0.0
    is_alive: bool = True
    preemptions: int = 0


class Engine(Protocol):
    @property
    def context_length(self) -> int: ...

    def submit(self, request: GenerationRequest, mailbox: Mailbox) -> int:
        """Queue a request and return its number. Raises InvalidRequest, ContextLengthExceeded,
        Overloaded or Unavailable; then nothing is ever posted. `sampling.max_tokens` None, or more
        than fits, means up to the context's end; only the prompt alone being too long is an
        error."""
        ...

    def cancel(self, number: int, choice: int | None = None) -> None:
        """End a request, or one choice of it (which then gets no SequenceEnded), within two steps,
        whatever its state. When its last choice is cancelled the request ends. Unknown numbers are
        ignored."""
        ...

    def stats(self) -> EngineStats: ...

    def close(self, drain_seconds: float = 0.0) -> None:
        """Refuse new requests, let running ones end for so long, cancel the rest, stop the
        thread."""
        ...


class _Doorbell:
    """Wakes one event loop once for all that arrived since it last looked, however many mailboxes
    it holds: at 32 streams a step costs one wake-up, not 32."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)  # weakly: the table below must not keep a loop alive
        self._lock = Lock()
        self._arrived: list[tuple[AsyncMailbox, Sequence[Message]]] = []

    def ring(self, mailbox: AsyncMailbox, messages: Sequence[Message]) -> None:
        with self._lock:
            self._arrived.append((mailbox, messages))
            if len(self._arrived) > 1:
                return  # the loop has been called and has not come yet
        loop = self._loop()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._answer)
        except RuntimeError:  # the loop is closed: nobody reads any more
            pass

    def _answer(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, []
        for mailbox, messages in arrived:
            mailbox.deliver(messages)


# One doorbell per event loop, gone with its loop. Not state of ours: a name for the loop's own.
_doorbells: WeakKeyDictionary[asyncio.AbstractEventLoop, _Doorbell] = WeakKeyDictionary()


class AsyncMailbox:
    """Messages for a coroutine: `async for message in mailbox`, ending after Ended. Made on the
    loop that reads it."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        doorbell = _doorbells.get(loop)
        if doorbell is None:
            doorbell = _doorbells[loop] = _Doorbell(loop)
        self._doorbell = doorbell
        self._messages: deque[Message] = deque()
        self._arrived = asyncio.Event()

    def post(self, messages: Sequence[Message]) -> None:
        self._doorbell.ring(self, messages)

    def deliver(self, messages: Sequence[Message]) -> None:
        """On the loop's own thread."""
        self._messages.extend(messages)
        self._arrived.set()

    async def __aiter__(self) -> AsyncIterator[Message]:
        while True:
            while not self._messages:
                self._arrived.clear()
                await self._arrived.wait()
            message = self._messages.popleft()
            yield message
            if isinstance(message, Ended):
                return


class BlockingMailbox:
    """Messages for a thread: `for message in mailbox`, ending after Ended."""

    def __init__(self) -> None:
        self._messages: SimpleQueue[Message] = SimpleQueue()

    def post(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self._messages.put(message)

    def __iter__(self) -> Iterator[Message]:
        while True:
            message = self._messages.get()
            yield message
            if isinstance(message, Ended):
                return
