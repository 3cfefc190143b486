"""One request's life: its choices' ids, counters and status, and what is to be posted about it.

A Request is what was submitted; each of its n choices is a Sequence: prompt and drawn ids in one
list, of which the first `computed` have their keys and values in the cache. Plain Python without
torch; made by engine.py, moved along by scheduler.py, whose blocks are cache.py's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

from serve.engine.face import (
    Ended,
    GenerationRequest,
    Mailbox,
    Matcher,
    Message,
    SequenceEnded,
    Tokens,
    TokenScore,
)

if TYPE_CHECKING:
    from serve.engine.cache import BlockTable
    from serve.errors import ServeError


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Request:
    """`limit` is how many ids a choice may draw, `ends` the ids that end one (besides `limit`)."""

    number: int
    generation: GenerationRequest
    mailbox: Mailbox
    limit: int
    ends: frozenset[int]
    seed: int
    arrived: float = field(default_factory=time.monotonic)
    sequences: list[Sequence] = field(default_factory=list)
    outbox: list[Message] = field(default_factory=list)
    cached_tokens: int = 0
    first_token_at: float = 0.0
    is_cancelled: bool = False
    is_ended: bool = False
    told_ahead: int = -1
    counts_draws: bool = False

    @classmethod
    def create(
        cls,
        number: int,
        generation: GenerationRequest,
        mailbox: Mailbox,
        room: int,
        eos_ids: frozenset[int],
        seed: int,
    ) -> Request:
        """With its n choices; `room` ids fit behind its prompt, `seed` is 64 well mixed bits."""
        sampling = generation.sampling
        ends = generation.stop_ids | frozenset(sampling.stop_token_ids)
        made = cls(
            number=number,
            generation=generation,
            mailbox=mailbox,
            limit=room if sampling.max_tokens is None else min(room, sampling.max_tokens),
            ends=ends if sampling.ignore_eos else ends | eos_ids,
            seed=seed,
            counts_draws=bool(
                sampling.frequency_penalty
                or sampling.presence_penalty
                or sampling.repetition_penalty != 1.0
            ),
        )
        prompt = generation.prompt.ids
        made.sequences = [Sequence(made, c, list(prompt), seed ^ c) for c in range(sampling.n)]
        return made

    @property
    def tenant(self) -> str:
        return self.generation.tenant

    @property
    def is_seeded(self) -> bool:
        """Whether its draws are to be the same in any batch."""
        sampling = self.generation.sampling
        return sampling.seed is not None and sampling.temperature > 0

    @property
    def prompt_length(self) -> int:
        return len(self.generation.prompt.ids)

    @property
    def completion_tokens(self) -> int:
        return sum(sequence.drawn for sequence in self.sequences)

    def ended(self, error: ServeError | None, now: float) -> Ended:
        """The one terminal message: cancelled when no choice came to its own end."""
        reached = any(sequence.reason is not None for sequence in self.sequences)
        is_cut = self.is_cancelled or not reached
        outcome: Literal["finished", "failed", "cancelled"] = "cancelled" if is_cut else "finished"
        return Ended(
            "failed" if error is not None else outcome,
            error,
            prompt_tokens=self.prompt_length,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.completion_tokens,
            first_token_seconds=max(self.first_token_at - self.arrived, 0.0),
            total_seconds=now - self.arrived,
        )


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice. `row` is its place in the device's tables while it runs, else -1."""

    request: Request
    choice: int
    ids: list[int]
    seed: int
    computed: int = 0
    status: Status = Status.WAITING
    row: int = -1
    tables: tuple[BlockTable, ...] = ()
    hashes: list[bytes] = field(default_factory=list)
    matcher: Matcher | None = None
    reason: Literal["stop", "length"] | None = None
    has_prefilled: bool = False
    counts: dict[int, int] = field(default_factory=dict)  # drawn ids, where a penalty needs them

    @property
    def drawn(self) -> int:
        return len(self.ids) - self.request.prompt_length

    @property
    def uncomputed(self) -> int:
        return len(self.ids) - self.computed

    @property
    def age(self) -> tuple[int, int]:
        """Smaller is older: the order in which requests came, then the choice."""
        return (self.request.number, self.choice)

    def seen_ids(self) -> set[int]:
        return self.counts.keys() | set(self.request.generation.prompt.ids)

    def append(self, token: int, score: TokenScore | None, now: float) -> None:
        """Take a drawn id, tell the mailbox, and set `reason` when it ends the choice."""
        request = self.request
        self.ids.append(token)
        if request.counts_draws:
            self.counts[token] = self.counts.get(token, 0) + 1
        request.first_token_at = request.first_token_at or now
        request.outbox.append(Tokens((token,), self.choice, () if score is None else (score,)))
        if self.matcher is not None and token not in request.ends:
            self.matcher.accept(token)
        drawn = self.drawn
        if token in request.ends and drawn > request.generation.sampling.min_tokens:
            self.reason = "stop"
        elif self.matcher is not None and self.matcher.is_finished():
            self.reason = "stop"
        elif drawn >= request.limit:
            self.reason = "length"
        if self.reason is not None:
            request.outbox.append(SequenceEnded(self.reason, self.choice))
