"""Who runs next: admission, chunked prefill, decode, preemption. Plain Python, no torch.

Every step decodes all running sequences first, then spends what is left of the step's prompt budget
on prompts, shared so that a short prompt is not held up by a long one. New requests come in turn by
tenant, first come first served within one. When blocks run out, the youngest sequence gives all its
blocks back and is computed again later. Knows sequences and the cache's books; engine.py drives it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass

from serve.engine.cache import KVCache
from serve.engine.sequence import Request, Sequence, Status

_PROMPTS_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` ids of a sequence to compute from `start`. The last of its ids draws a new one."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count

    @property
    def draws(self) -> bool:
        return self.end == len(self.sequence.ids)


class WaitingLine:
    """Requests' sequences that have not begun: one line per tenant, tenants take turns."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Sequence]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Sequence]:
        """In the order they would be admitted."""
        rounds = max(map(len, self._lines.values()), default=0)
        for place in range(rounds):
            for line in self._lines.values():
                if place < len(line):
                    yield line[place]

    def push(self, sequence: Sequence) -> None:
        self._lines.setdefault(sequence.request.tenant, deque()).append(sequence)

    def first(self) -> Sequence | None:
        return next(iter(self._lines.values()))[0] if self._lines else None

    def pop(self) -> Sequence:
        """The first; its tenant goes to the end of the round."""
        tenant, line = self._lines.popitem(last=False)
        sequence = line.popleft()
        if line:
            self._lines[tenant] = line
        return sequence

    def remove(self, sequence: Sequence) -> None:
        tenant = sequence.request.tenant
        line = self._lines.get(tenant)
        if line is None or sequence not in line:
            return
        line.remove(sequence)
        if not line:
            del self._lines[tenant]


class Scheduler:
    """`max_running` sequences at once, `prefill_chunk` prompt tokens a step."""

    def __init__(self, cache: KVCache, max_running: int, prefill_chunk: int) -> None:
        self.cache = cache
        self.max_running = max_running
        self.prefill_chunk = prefill_chunk
        self.running: list[Sequence] = []
        self.waiting = WaitingLine()
        self.returning: list[Sequence] = []  # preempted, or choices of a computed prompt
        self.preemptions = 0
        self._rows = list(range(max_running - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.returning or len(self.waiting))

    def add(self, request: Request) -> None:
        """Queue a request's first choice; the others follow when its prompt is in the cache."""
        self.waiting.push(request.sequences[0])

    def schedule(self) -> list[Chunk]:
        """The chunks of this step, decodes first. Their blocks are taken."""
        chunks = self._decodes()
        entered = self._admit()
        chunks += self._prefills(entered)
        while not chunks and self.running:
            # Prompts that hold blocks wait for each other: the youngest makes room.
            self.preempt(max(self.running, key=lambda s: s.age))
            chunks = self._prefills(entered)
        return chunks

    def ahead(self, chunks: Many[Chunk]) -> list[Chunk]:
        """The step after `chunks`, while those are still being computed: one more id for each that
        `limit` does not end. Empty when what comes next depends on their ids: somebody may enter,
        a prompt is in work, or blocks are short."""
        going = [chunk for chunk in chunks if chunk.sequence.status is Status.RUNNING]
        if len(going) < len(self.running) or self._next_in_line() is not None:
            return []
        made = []
        for chunk in going:
            request = chunk.sequence.request
            if chunk.end + 1 - request.prompt_length < request.limit:
                if not self.cache.extend(chunk.sequence, chunk.end + 1):
                    return []
                made.append(Chunk(chunk.sequence, chunk.end, 1))
        return made

    def computed(self, chunk: Chunk) -> None:
        """The chunk's keys and values are in the cache (before its drawn id is appended)."""
        sequence = chunk.sequence
        self.cache.advance(sequence, chunk.end)
        if chunk.draws and not sequence.has_prefilled:
            sequence.has_prefilled = True
            self._release_siblings(sequence)

    def drop(self, sequence: Sequence) -> None:
        """It ended, whatever its state: blocks and row go back."""
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        elif sequence in self.returning:
            self.returning.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = Status.ENDED
        if not sequence.has_prefilled:
            sequence.has_prefilled = True
            self._release_siblings(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Give its blocks back now and compute it again when there is room."""
        self._leave(sequence)
        sequence.status = Status.WAITING
        self._return(sequence)
        self.preemptions += 1

    def check(self) -> None:
        self.cache.check(self.running)
        rows = sorted(self._rows + [s.row for s in self.running])
        assert rows == list(range(self.max_running)), "a row is lost"
        assert all(s.status is Status.RUNNING for s in self.running)
        assert all(s.status is Status.WAITING for s in [*self.returning, *self.waiting])

    # -- inside ------------------------------------------------------------------------------------

    def _decodes(self) -> list[Chunk]:
        chunks = []
        for sequence in sorted(self.running, key=lambda s: s.age):
            is_preempted = sequence.status is not Status.RUNNING  # by an older one, in this loop
            if is_preempted or sequence.uncomputed > 1 or not sequence.has_prefilled:
                continue
            if self._make_room(sequence):
                chunks.append(Chunk(sequence, sequence.computed, 1))
        return chunks

    def _prefills(self, entered: list[Sequence]) -> list[Chunk]:
        """Share the budget: each may take an equal part, what a short one leaves goes on. Who has
        just `entered` runs now, also one that came back with a single id to compute."""
        budget, chunks = self.prefill_chunk, []
        prompts = [
            s for s in self.running if s.uncomputed > 1 or not s.has_prefilled or s in entered
        ]
        prompts.sort(key=lambda s: s.uncomputed)
        for left, sequence in zip(range(len(prompts), 0, -1), prompts, strict=True):
            count = min(sequence.uncomputed, max(budget // left, 1), budget)
            if count and self.cache.extend(sequence, sequence.computed + count):
                chunks.append(Chunk(sequence, sequence.computed, count))
                budget -= count
        return chunks

    def _make_room(self, sequence: Sequence) -> bool:
        """A block for its next token, preempting the youngest for it. False: that was itself."""
        while not self.cache.extend(sequence, sequence.computed + 1):
            youngest = max(self.running, key=lambda s: s.age)
            self.preempt(youngest)
            if youngest is sequence:
                return False
        return True

    def _admit(self) -> list[Sequence]:
        """Let in who fits beside what the running ones will still take. Prompts beyond this step's
        budget wait, but for a few: a short one must not wait for a long one to be computed."""
        prompts = [s for s in self.running if s.uncomputed > 1]
        budget = self.prefill_chunk - sum(s.uncomputed for s in prompts)
        count = len(prompts)
        entered: list[Sequence] = []
        while budget > 0 or count < _PROMPTS_AT_ONCE:
            sequence = self._next_in_line()
            if sequence is None:
                break
            if self.returning:
                self.returning.pop(0)
            else:
                self.waiting.pop()
            self._enter(sequence)
            entered.append(sequence)
            budget -= sequence.uncomputed
            count += 1
        return entered

    def _next_in_line(self) -> Sequence | None:
        """Who may enter now: a row is free and its ids fit."""
        if len(self.running) >= self.max_running:
            return None
        sequence = self.returning[0] if self.returning else self.waiting.first()
        if sequence is None or self.cache.can_admit(sequence, self.prefill_chunk, self.running):
            return sequence
        return None

    def _enter(self, sequence: Sequence) -> None:
        shared = self.cache.admit(sequence)
        sequence.row = self._rows.pop()
        sequence.status = Status.RUNNING
        self.running.append(sequence)
        if sequence.choice == 0 and not sequence.drawn:
            sequence.request.cached_tokens = shared

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.cache.release(sequence)
        self._rows.append(sequence.row)
        sequence.row = -1

    def _return(self, sequence: Sequence) -> None:
        self.returning.append(sequence)
        self.returning.sort(key=lambda s: s.age)

    def _release_siblings(self, sequence: Sequence) -> None:
        """The prompt's blocks are known now: the other choices share them."""
        if sequence.choice == 0:
            for sibling in sequence.request.sequences[1:]:
                if sibling.status is Status.WAITING and sibling not in self.returning:
                    self._return(sibling)
