"""The one path: ChatRequest -> format -> engine -> parser -> events, for the page and the API
alike.

Knows which model serves (or how far its loading is) and turns the engine's messages into the event
stream that values.py promises: exactly one terminal event, whatever happens. Knows no HTTP and no
widgets.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any, assert_never

from serve.engine.face import (
    AsyncMailbox,
    Ended,
    Engine,
    EngineStats,
    GenerationRequest,
    SequenceEnded,
    Tokens,
    TokenScore,
    Waiting,
)
from serve.errors import Forbidden, ModelLoading, ModelNotFound, ServeError, Unavailable
from serve.formats.base import ChatFormat, Rendered, StreamParser
from serve.values import (
    Accepted,
    Cancelled,
    ChatRequest,
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    ModelCard,
    PassedOver,
    Phase,
    Progress,
    Queued,
    Sampling,
    Status,
    TextRequest,
    Timing,
    Usage,
)

log = logging.getLogger(__name__)

RENDER_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model with everything a request needs of it."""

    card: ModelCard
    format: ChatFormat
    engine: Engine


class Service:
    """One per process. The loading thread reports into it; requests and the page read from it."""

    def __init__(self, requested: str = "", public_name: str = "gpt-oss:20b") -> None:
        self._public_name = public_name
        self._served: ServedModel | None = None  # the one that "default" means
        self._held: dict[str, ServedModel] = {}  # all that are loaded, by id, it among them
        self._status = Status(requested=requested)
        self._wanted: SimpleQueue[str | None] = SimpleQueue()
        self._lock = threading.Lock()

    def _tell(self, **news: Any) -> None:
        with self._lock:
            self._status = replace(self._status, **news)

    # -- what serves, and how far it is (told by the loading thread) -------------------------------

    def report(self, progress: Progress) -> None:
        self._tell(progress=progress)

    def pass_over(self, candidate: PassedOver) -> None:
        with self._lock:
            passed_over = (*self._status.passed_over, candidate)
            self._status = replace(self._status, passed_over=passed_over)

    def fail(self, reason: str) -> None:
        """Nothing more is tried by itself; `reason` is for everybody to read. What was to be loaded
        beside a model leaves that one serving."""
        phase: Phase = "failed" if self._served is None else "ready"
        self._tell(progress=Progress(phase, detail=reason), wanted="")

    def offer(self, ids: Sequence[str], seeing: Sequence[str] = ()) -> None:
        """The models that fit this machine, by id; they may be switched between. `seeing`: those
        made for images too."""
        self._tell(offered=tuple(ids), seeing=tuple(seeing))

    def wait_for_switch(self) -> str | None:
        """For the loading thread: the next model that somebody wants, "" for what the settings
        name, or None when all is over. What serves already (two asked at once) is not told."""
        while True:
            wanted = self._wanted.get()
            if wanted is None or self._served is None or wanted not in ("", self._served.card.id):
                self._tell(wanted=wanted or "")
                return wanted

    def detach(self) -> ServedModel | None:
        """From now on requests are told that a model is loading. Running ones keep their engine;
        the caller drains and closes it. What else is loaded comes with the next calls."""
        served, self._served = self._served, None
        if served is None and self._held:
            served = next(iter(self._held.values()))
        if served is not None:
            self._hold(without=served.card.id)
        self._tell(model=None, progress=Progress("loading", self._status.wanted))
        return served

    def attach(self, served: ServedModel) -> None:
        """From now on `served` answers; what else is loaded still answers to its own id."""
        self._hold(served)
        self._served = served
        ready = replace(self._status.progress, phase="ready", detail="")
        self._tell(model=served.card, progress=ready, wanted="")

    def _hold(self, served: ServedModel | None = None, without: str = "") -> None:
        """A new table, never a changed one: other threads read it."""
        held = {name: kept for name, kept in self._held.items() if name != without}
        self._held = held if served is None else {**held, served.card.id: served}
        self._tell(loaded=tuple(self._held))

    def status(self) -> Status:
        stats = self.engine_stats()
        if stats is None:
            return self._status
        return replace(self._status, running=stats.running, waiting=stats.waiting)

    def engine_stats(self) -> EngineStats | None:
        """Of every loaded model together; None while there is none."""
        found = [held.engine.stats() for held in self._held.values()]
        if len(found) < 2:
            return found[0] if found else None
        return EngineStats(
            running=sum(one.running for one in found),
            waiting=sum(one.waiting for one in found),
            kv_blocks_total=sum(one.kv_blocks_total for one in found),
            kv_blocks_free=sum(one.kv_blocks_free for one in found),
            tokens_per_second=sum(one.tokens_per_second for one in found),
            last_step_age_seconds=max(one.last_step_age_seconds for one in found),
            is_alive=all(one.is_alive for one in found),
            preemptions=sum(one.preemptions for one in found),
        )

    def models(self) -> tuple[ModelCard, ...]:
        """Of what is loaded; first the one that "default" means."""
        served, held = self._served, self._held
        others = [one.card for one in held.values() if one is not served]
        return (*(() if served is None else (served.card,)), *others)

    def card(self, name: str) -> ModelCard | None:
        """Of the model that a request naming `name` gets, if it gets one now."""
        served = self._held.get(name) or self._served
        return None if served is None else served.card

    def model(self, name: str) -> ModelCard:
        """The card of a served model by id or alias. Raises ModelNotFound or ModelLoading."""
        return self._find(name).card

    def switch(self, name: str) -> ServeError:
        """Ask for an offered model; running requests end first, new ones wait for it. Returns what
        to tell callers. One that is loaded beside the served one takes its place at once."""
        held = self._held.get(name)
        if held is not None and self._served is not None and not self._status.wanted:
            self.attach(held)
        elif self._served is None or name != self._served.card.id:
            self._tell(wanted=name, progress=Progress("loading", name))
            self._wanted.put(name)
        return ModelLoading(
            f"The model {name!r} is being loaded, as was asked. Try again soon.",
            retry_after=10,
        )

    def load_again(self) -> None:
        """After a failure: try everything that the settings name once more."""
        self._tell(passed_over=(), progress=Progress("starting"))
        self._wanted.put("")

    def close(self, drain_seconds: float = 0.0) -> None:
        self._wanted.put(None)
        until = time.monotonic() + drain_seconds
        for held in self._held.values():
            held.engine.close(max(until - time.monotonic(), 0.0))

    def _resolve(self, request: ChatRequest | TextRequest) -> ServedModel:
        """The model a request names, or the ServeError that says why it cannot answer."""
        name = request.model
        if name in self._held:
            return self._held[name]
        served = self._served
        if served is not None and self._status.wanted:
            raise self._not_ready()
        is_elsewhere = name in self._status.offered and served and name != served.card.id
        if not is_elsewhere:
            return self._find(name)
        if not request.may_switch:
            raise Forbidden(
                f"The model {name!r} is not loaded, and this key may not switch models "
                "(MODEL_SWITCH).",
                param="model",
            )
        raise self.switch(name)

    def _find(self, name: str) -> ServedModel:
        held, served = self._held.get(name), self._served
        if held is not None:
            return held
        if served is None:
            raise self._not_ready()
        if name in (served.card.id, "default", self._public_name, *served.card.aliases):
            return served
        known = ", ".join(dict.fromkeys((*self._held, "default", self._public_name)))
        raise ModelNotFound(
            f"The model {name!r} is not served here. Served now: {known}.", param="model"
        )

    def _not_ready(self) -> ServeError:
        progress = self._status.progress
        if progress.phase == "failed":
            return Unavailable(
                "No model could be loaded. GET /ready says why and what to set.", retry_after=60
            )
        left = progress.seconds_left
        wait = 10.0 if left is None else min(max(left, 1.0), 300.0)
        return ModelLoading(
            f"The model is not ready yet ({progress.phase}). Try again in {wait:.0f} s.",
            retry_after=wait,
        )

    # -- requests ----

    async def chat(self, request: ChatRequest) -> AsyncGenerator[Event]:
        """Events of one request. Closing the iterator early cancels the work within one step."""
        try:
            served = self._resolve(request)
            rendered = await _off_loop(lambda: served.format.render(request))
        except ServeError as error:
            yield Failed(error)
            return
        parsers = [served.format.parser(request, i) for i in range(request.sampling.n)]
        run = _Run(served.engine, _generation(rendered, request, served.card.defaults), parsers)
        async with contextlib.aclosing(run.events()) as events:
            async for event in events:
                yield event

    async def count(self, request: ChatRequest) -> int:
        """Tokens of the request's prompt, without asking the engine. Raises as `chat` fails."""
        served = self._resolve(request)
        rendered = await _off_loop(lambda: served.format.render(request))
        return len(rendered.prompt.ids)

    async def complete(self, request: TextRequest) -> AsyncGenerator[Event]:
        """Events of a raw prompt's continuation: text only."""
        try:
            served = self._resolve(request)
            rendered = await _off_loop(lambda: served.format.render_text(request))
        except ServeError as error:
            yield Failed(error)
            return
        parsers = [served.format.text_parser(request, i) for i in range(request.sampling.n)]
        run = _Run(served.engine, _generation(rendered, request, served.card.defaults), parsers)
        async with contextlib.aclosing(run.events()) as events:
            async for event in events:
                yield event


def _generation(
    rendered: Rendered, request: ChatRequest | TextRequest, defaults: Sampling
) -> GenerationRequest:
    sampling = request.sampling
    return GenerationRequest(
        prompt=rendered.prompt,
        sampling=replace(sampling, **{name: getattr(defaults, name) for name in sampling.unset}),
        tenant=request.tenant,
        stop_ids=rendered.stop_ids,
        grammar=rendered.grammar,
    )


async def _off_loop(work: Callable[[], Rendered]) -> Rendered:
    """Templates, tokenizers and grammars run on a thread, with a time limit for the caller."""
    try:
        return await asyncio.wait_for(asyncio.to_thread(work), RENDER_SECONDS)
    except TimeoutError:
        raise Unavailable(
            "Preparing this prompt took too long.", retry_after=RENDER_SECONDS
        ) from None


class _Run:
    """One request in flight: the engine's messages in, events out."""

    def __init__(
        self, engine: Engine, generation: GenerationRequest, parsers: Sequence[StreamParser]
    ) -> None:
        self._engine = engine
        self._generation = generation
        self._parsers = parsers
        self._open = set(range(len(parsers)))
        self._completion_tokens = 0
        self._number = -1

    async def events(self) -> AsyncGenerator[Event]:
        mailbox = AsyncMailbox()
        try:
            self._number = self._engine.submit(self._generation, mailbox)
        except ServeError as error:
            yield Failed(error)
            return
        has_ended = False
        try:
            yield Accepted(len(self._generation.prompt.ids))
            async for message in mailbox:
                has_ended = isinstance(message, Ended)
                for event in self._translate(message):
                    yield event
        finally:
            if not has_ended:
                self._engine.cancel(self._number)

    def _translate(self, message: Waiting | Tokens | SequenceEnded | Ended) -> list[Event]:
        match message:
            case Tokens():
                return self._read(message)
            case Waiting():
                return [Queued(message.ahead, message.wait_seconds)]
            case SequenceEnded():
                return self._end_choice(message.choice, message.reason)
            case Ended():
                return self._end(message)
        assert_never(message)

    def _read(self, tokens: Tokens) -> list[Event]:
        """Feed one id at a time, so that what counts and what is said stops exactly at a stop
        string."""
        if tokens.choice not in self._open:
            return []
        parser = self._parsers[tokens.choice]
        events: list[Event] = []
        for i, token in enumerate(tokens.ids):
            scores: tuple[TokenScore, ...] = tokens.scores[i : i + 1]
            self._completion_tokens += 1
            events += parser.feed((token,), scores)
            if parser.is_stopped:
                events += self._end_choice(tokens.choice, "stop")
                if self._open:
                    self._engine.cancel(self._number, tokens.choice)
                else:
                    self._engine.cancel(self._number)
                break
        return events

    def _end_choice(self, choice: int, reason: str) -> list[Event]:
        if choice not in self._open:
            return []
        self._open.discard(choice)
        parser = self._parsers[choice]
        tail: list[Event] = [*parser.finish()]
        ended = parser.reason("length" if reason == "length" else "stop")
        return [*tail, ChoiceFinished(ended, choice)]

    def _end(self, ended: Ended) -> list[Event]:
        usage = Usage(
            prompt_tokens=ended.prompt_tokens,
            completion_tokens=self._completion_tokens,
            cached_tokens=ended.cached_tokens,
            reasoning_tokens=sum(parser.reasoning_tokens for parser in self._parsers),
        )
        timing = Timing(ended.first_token_seconds, ended.total_seconds)
        if ended.outcome == "failed" and ended.error is not None:
            return [Failed(ended.error)]
        if ended.outcome == "finished" or not self._open:
            return [Finished(usage, timing)]
        return [Cancelled(usage)]
