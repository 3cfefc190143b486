"""Greedy output equals model.generate, token for token, whatever else the engine is doing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from serve.engine.engine import PagedEngine
from serve.engine.face import BlockingMailbox
from tests.engine_models import (
    EOS,
    FAMILIES,
    VOCABULARY,
    ended,
    engine_of,
    ids_of,
    request,
    run_all,
    run_one,
    tiny,
)

TIE = 1e-4
ANSWER = 24


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield tiny(request.param)


def prompts(seed: int, lengths: list[int]) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def generated(model: Any, asked: list[list[int]], count: int = ANSWER) -> list[list[int]]:
    """The answers of one left-padded, batched generate, each up to its first end."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    longest = max(map(len, asked))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in asked])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in asked])
    out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    model.set_attn_implementation(implementation)
    answers = [row[longest:] for row in out.tolist()]
    return [a[: a.index(EOS) + 1] if EOS in a else a for a in answers]


@torch.inference_mode()
def is_tie(model: Any, ids: list[int], ours: int, theirs: int) -> bool:
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    model.set_attn_implementation(implementation)
    return bool((logits[ours] - logits[theirs]).abs() < TIE)


def assert_equal(model: Any, asked: list[int], ours: list[int], theirs: list[int]) -> None:
    """Equal up to a first difference that is a tie; ties may be followed by anything."""
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            assert is_tie(model, asked + ours[:place], a, b), f"differs at {place}"
            return
    assert len(ours) == len(theirs)


def check(model: Any, engine: PagedEngine, asked: list[list[int]], count: int = ANSWER) -> None:
    answers = run_all(engine, [request(p, temperature=0.0, max_tokens=count) for p in asked])
    expected = generated(model, asked, count)
    for ids, messages, theirs in zip(asked, answers, expected, strict=True):
        assert ended(messages).outcome == "finished"
        assert_equal(model, ids, ids_of(messages), theirs)


def test_several_lengths_together(model: Any) -> None:
    engine = engine_of(model)
    check(model, engine, prompts(1, [1, 2, 5, 17, 40, 64, 33, 9, 100]))
    engine.close()


def test_odd_chunks_and_blocks(model: Any) -> None:
    engine = engine_of(model, prefill_chunk=7, block_size=3, max_running=3)
    check(model, engine, prompts(2, [1, 30, 50, 8]))
    engine.close()


def test_a_cache_so_small_that_sequences_are_preempted(model: Any) -> None:
    engine = engine_of(model, kv_cache_gb=0.00008, context_length=72)
    check(model, engine, prompts(3, [6, 5, 7, 6, 8, 20]), count=40)
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.kv_blocks_free == stats.kv_blocks_total
    engine.close()


def test_a_second_turn_shares_the_first_ones_blocks(model: Any) -> None:
    engine = engine_of(model)
    (first,) = prompts(4, [50])
    answer = ids_of(run_one(engine, request(first, temperature=0.0, max_tokens=ANSWER)))
    second = [*first, *answer, *prompts(5, [11])[0]]
    messages = run_one(engine, request(second, temperature=0.0, max_tokens=ANSWER))
    reused = ended(messages).cached_tokens
    assert len(first) + len(answer) - 8 <= reused < len(second)
    assert_equal(model, second, ids_of(messages), generated(model, [second])[0])
    engine.close()


def test_another_answer_to_the_same_prompt_shares_it_after_a_long_first_answer(model: Any) -> None:
    """The window before the prompt's end outlives an answer that has left it."""
    engine = engine_of(model)
    (asked,) = prompts(6, [41])
    run_one(engine, request(asked, temperature=0.0, max_tokens=60, ignore_eos=True))
    messages = run_one(engine, request(asked, temperature=0.0, max_tokens=ANSWER))
    assert ended(messages).cached_tokens == 40
    assert_equal(model, asked, ids_of(messages), generated(model, [asked])[0])
    engine.close()


def test_requests_that_join_and_leave_do_not_change_a_long_one(model: Any) -> None:
    engine = engine_of(model)
    asked = prompts(7, [30, 12, 60, 3, 45])
    box = BlockingMailbox()
    engine.submit(request(asked[0], temperature=0.0, max_tokens=50, ignore_eos=True), box)
    for i, other in enumerate(asked[1:]):
        passing = BlockingMailbox()
        number = engine.submit(request(other, temperature=1.0, max_tokens=200), passing)
        if i % 2:
            run_one(engine, request(other[::-1], temperature=0.0, max_tokens=3))
        engine.cancel(number)
    ours = ids_of(list(box))
    engine.close()
    (expected,) = generated(model, [asked[0]], 50)
    assert_equal(model, asked[0], ours[: len(expected)], expected)


def test_choices_of_one_prompt_are_equal_at_temperature_0(model: Any) -> None:
    engine = engine_of(model)
    (asked,) = prompts(8, [27])
    messages = run_one(engine, request(asked, temperature=0.0, max_tokens=ANSWER, n=4))
    assert ended(messages).completion_tokens == sum(len(ids_of(messages, c)) for c in range(4))
    (expected,) = generated(model, [asked])
    for choice in range(4):
        assert_equal(model, asked, ids_of(messages, choice), expected)
    engine.close()
