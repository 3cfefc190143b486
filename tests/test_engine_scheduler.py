"""The cache's books and the scheduler's choices, under random schedules and without a model."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.cache import GroupSpec, KVCache
from serve.engine.face import BlockingMailbox, GenerationRequest, Prompt
from serve.engine.scheduler import Chunk, Scheduler
from serve.engine.sequence import Request, Sequence, Status
from serve.values import Sampling

_numbers = itertools.count(1)


def ask(ids: list[int], tenant: str = "", n: int = 1, limit: int = 10) -> Request:
    generation = GenerationRequest(Prompt(tuple(ids)), Sampling(n=n), tenant=tenant)
    request = Request(next(_numbers), generation, BlockingMailbox(), limit, frozenset(), 0)
    request.sequences = [Sequence(request, c, list(ids), c) for c in range(n)]
    return request


def scheduler(
    blocks: int = 64, windows: tuple[int | None, ...] = (None,), chunk: int = 8, running: int = 4
) -> Scheduler:
    groups = tuple(GroupSpec(window, (i,), blocks) for i, window in enumerate(windows))
    return Scheduler(KVCache(groups, 4, 128), running, chunk)


def compute(s: Scheduler, chunks: list[Chunk]) -> None:
    """A step without a model: the drawn id is a function of the ids before it."""
    for chunk in chunks:
        s.computed(chunk)
        sequence = chunk.sequence
        if chunk.draws:
            sequence.ids.append(sum(sequence.ids[-3:]) % 50)
            if sequence.drawn >= sequence.request.limit:
                s.drop(sequence)


def run_out(s: Scheduler) -> int:
    steps = 0
    while s.has_work:
        chunks = s.schedule()
        assert chunks, "work is left and nothing runs"
        compute(s, chunks)
        s.check()
        steps += 1
    return steps


moves = st.lists(
    st.one_of(
        st.tuples(
            st.just("ask"),
            st.integers(1, 40),
            st.integers(0, 3),
            st.integers(1, 3),
            st.integers(1, 30),
        ),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("drop"), st.integers(0, 10**6)),
        st.tuples(st.just("preempt"), st.integers(0, 10**6)),
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None)
@given(
    moves,
    st.sampled_from([(None,), (6,), (None, 6), (3, 9, None)]),
    st.integers(24, 60),
    st.integers(1, 20),
)
def test_any_schedule_keeps_the_books_and_ends(
    moves: list[tuple[object, ...]], windows: tuple[int | None, ...], blocks: int, chunk: int
) -> None:
    s = scheduler(blocks, windows, chunk)
    asked: list[Request] = []
    for move in moves:
        match move:
            case ("ask", int(length), int(tenant), int(n), int(limit)):
                request = ask([i * (tenant % 2) for i in range(length)], str(tenant), n, limit)
                asked.append(request)
                s.add(request)
            case ("step", int(steps)):
                for _ in range(steps):
                    compute(s, s.schedule())
                    s.check()
            case ("drop", int(which)) if asked:
                request = asked[which % len(asked)]
                for sequence in request.sequences:
                    if sequence.status is not Status.ENDED:
                        s.drop(sequence)
            case ("preempt", int(which)) if s.running:
                s.preempt(s.running[which % len(s.running)])
        s.check()
    run_out(s)
    assert all(q.status is Status.ENDED for r in asked for q in r.sequences)
    assert s.cache.free_blocks == s.cache.total_blocks


def test_a_shared_block_always_holds_the_same_ids() -> None:
    """What a sequence takes over from the cache is what it would have written there itself."""
    draw = random.Random(0)
    s = scheduler(blocks=40, windows=(None, 8), chunk=16)
    written: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}
    for round_ in range(300):
        if round_ % 2 == 0:
            beginning = [draw.randrange(2)] * draw.randrange(1, 30)
            s.add(ask([*beginning, *draw.choices(range(9), k=5)], draw.choice("ab"), limit=6))
        chunks = s.schedule()
        for chunk in chunks:
            sequence = chunk.sequence
            for group, table in enumerate(sequence.tables):
                for column in range(table.first, table.count):
                    block, end = int(table.ids[column]), (column + 1) * 4
                    here = (sequence.request.tenant, tuple(sequence.ids[:end]))
                    if end <= chunk.start:
                        assert written[group, block] == here
                    elif end <= chunk.end:
                        written[group, block] = here
        compute(s, chunks)
    assert s.cache.free_blocks > 0


def test_one_tenants_prompt_is_unknown_to_another() -> None:
    s = scheduler()
    for tenant, reused in (("a", 0), ("b", 0), ("a", 16), ("b", 16)):
        request = ask(list(range(20)), tenant)
        s.add(request)
        run_out(s)
        assert request.cached_tokens == reused


@pytest.mark.parametrize("apart", [False, True])
def test_a_seed_keeps_to_its_own_blocks_only_where_it_is_computed_otherwise(apart: bool) -> None:
    s = Scheduler(KVCache((GroupSpec(None, (0,), 64),), 4, 128, seeded_apart=apart), 8, 4)
    plain, seeded = ask(list(range(20))), ask(list(range(20)))
    seeded.generation = replace(seeded.generation, sampling=Sampling(seed=1))
    for request in (plain, seeded):
        s.add(request)
        run_out(s)
    assert seeded.cached_tokens == (0 if apart else 16)


def test_decodes_go_on_while_a_long_prompt_is_computed() -> None:
    s = scheduler(chunk=8)
    short, long = ask([1, 2], limit=50), ask(list(range(60)), limit=2)
    s.add(short)
    compute(s, s.schedule())
    s.add(long)
    while not long.sequences[0].has_prefilled:
        chunks = s.schedule()
        assert chunks[0].sequence is short.sequences[0] and chunks[0].count == 1
        assert sum(chunk.count for chunk in chunks[1:]) <= 8
        compute(s, chunks)


def test_a_short_prompt_begins_beside_a_long_one_within_two_steps() -> None:
    s = scheduler(chunk=8, blocks=200)
    s.add(ask(list(range(100)), limit=2))
    compute(s, s.schedule())
    short = ask([1, 2, 3], limit=2)
    s.add(short)
    for _ in range(2):
        compute(s, s.schedule())
    assert short.sequences[0].has_prefilled


def test_tenants_take_turns() -> None:
    s = scheduler(running=1, chunk=100)
    first = [ask([1, 2, i], "busy", limit=1) for i in range(4)]
    other = ask([1, 2, 3], "quiet", limit=1)
    for request in [*first, other]:
        s.add(request)
    order = []
    while s.has_work:
        chunks = s.schedule()
        order.append(chunks[0].sequence.request)
        compute(s, chunks)
    assert order.index(other) == 1


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    s = scheduler(blocks=16, chunk=64)
    old, young = ask(list(range(24)), limit=30), ask(list(range(50, 74)), limit=20)
    s.add(old)
    s.add(young)
    while young.sequences[0] not in s.returning:
        compute(s, s.schedule())
        s.check()
    assert old.sequences[0] in s.running
    run_out(s)
    assert s.preemptions >= 1 and young.sequences[0].drawn == 20


def test_choices_share_their_prompts_blocks() -> None:
    s = scheduler(chunk=64, running=8)
    request = ask(list(range(33)), n=4)
    s.add(request)
    compute(s, s.schedule())
    compute(s, s.schedule())
    shared = {tuple(q.tables[0].ids[:8]) for q in request.sequences}
    assert len(s.running) == 4 and len(shared) == 1
    s.check()


def test_a_window_holds_only_its_own_blocks() -> None:
    s = scheduler(blocks=12, windows=(8,), chunk=8)
    request = ask(list(range(60)), limit=60)
    s.add(request)
    most = 0
    while s.has_work:
        compute(s, s.schedule())
        for sequence in s.running:
            most = max(most, sequence.tables[0].count - sequence.tables[0].first)
    assert most <= s.cache.blocks_needed(0, 10**6, 8)


def test_neighbouring_blocks_are_found_for_one_sequence() -> None:
    s = scheduler(blocks=4096, chunk=4096, running=8)
    requests = [ask(list(range(i, i + 40)), limit=60) for i in range(8)]
    for request in requests:
        s.add(request)
    for _ in range(50):
        compute(s, s.schedule())
    assert all(len(q.tables[0].runs) == 1 for r in requests for q in r.sequences)


def test_what_is_known_is_kept_while_there_is_room() -> None:
    """An answer that grows beside a known prompt's blocks goes elsewhere."""
    s = scheduler(blocks=40)
    prompts = [[100 * n + i for i in range(8)] for n in range(4)]
    for prompt in prompts:
        s.add(ask(prompt, limit=1))
        run_out(s)
    s.add(ask([*prompts[0], 7], limit=30))
    run_out(s)
    for prompt in prompts:
        again = ask([*prompt, 7], limit=1)
        s.add(again)
        run_out(s)
        assert again.cached_tokens == 8


def test_a_broken_book_is_noticed() -> None:
    s = scheduler()
    s.add(ask(list(range(20))))
    compute(s, s.schedule())
    s.cache.pools[0].release(int(s.running[0].tables[0].ids[0]))
    with pytest.raises(AssertionError):
        s.check()
