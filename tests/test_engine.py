"""The engine's promises: one end per request, whatever goes wrong, and nobody else is touched."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from serve.engine import decoder
from serve.engine.engine import PagedEngine
from serve.engine.face import (
    AsyncMailbox,
    BlockingMailbox,
    GenerationRequest,
    Message,
    Prompt,
    SequenceEnded,
    Tokens,
    Waiting,
)
from serve.errors import (
    ContextLengthExceeded,
    EngineFailed,
    InvalidRequest,
    OutOfMemory,
    Overloaded,
    ServeError,
    Unavailable,
)
from serve.values import Sampling
from tests.engine_models import (
    EOS,
    VOCABULARY,
    ended,
    engine_of,
    ids_of,
    request,
    run_all,
    run_one,
    tiny,
)

GOOD = list(range(3, 40))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture
def engine(model: Any) -> Iterator[PagedEngine]:
    engine = engine_of(model)
    yield engine
    engine.close()


def is_at_baseline(engine: PagedEngine) -> bool:
    for _ in range(200):
        stats = engine.stats()
        if (
            not stats.running
            and not stats.waiting
            and stats.kv_blocks_free == stats.kv_blocks_total
        ):
            return True
        time.sleep(0.01)
    return False


class Fault:
    """Stands in the runner's place for one call: `act` runs before the real step."""

    def __init__(self, engine: PagedEngine, act: Any, after: int = 0) -> None:
        self.runner = engine._runner
        self.real, self.act, self.after, self.calls = self.runner.forward, act, after, 0
        self.runner.forward = self  # type: ignore[method-assign, assignment]

    def __call__(self, chunks: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls > self.after:
            logits = self.act(chunks, self.real)
            if logits is not None:
                return logits  # type: ignore[no-any-return]
        return self.real(chunks)


# -- ranges: every number that could reach a kernel ------------------------------------------------

BAD: list[tuple[str, Any]] = [
    *[("temperature", v) for v in (-0.1, 2.1, float("nan"), float("inf"), True, "1", 10**400)],
    *[("top_p", v) for v in (0, -1, 1.5, float("nan"), False)],
    *[("min_p", v) for v in (-0.1, 1.1, float("nan"))],
    *[("top_k", v) for v in (-5, 2**40, 1.5, True)],
    *[("frequency_penalty", v) for v in (-2.5, 3, float("-inf"))],
    *[("presence_penalty", v) for v in (-2.5, 3, float("nan"))],
    *[("repetition_penalty", v) for v in (0, -1, 11, float("nan"))],
    *[("max_tokens", v) for v in (0, -1, 2**31, True, 1.0)],
    *[("min_tokens", v) for v in (-1, 2**31, None)],
    *[("seed", v) for v in (2**64, -(2**63) - 1, 1.5, True)],
    *[("logprobs", v) for v in (-1, 21, True)],
    *[("n", v) for v in (0, 9, -1, True)],
    *[("logit_bias", v) for v in (((VOCABULARY, 1.0),), ((-1, 1.0),), ((3, 101.0),))],
    ("logit_bias", ((3, float("nan")),)),
    ("logit_bias", tuple((i % 300, 0.0) for i in range(1025))),
    ("stop_token_ids", (VOCABULARY,)),
    ("ignore_eos", 1),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda part: str(part)[:16])
def test_a_number_out_of_range_is_refused_by_name(
    engine: PagedEngine, name: str, value: Any
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        engine.submit(request(GOOD, **{name: value}), BlockingMailbox())
    assert refused.value.param == name and name.split("_")[0] in str(refused.value).lower()


@pytest.mark.parametrize("ids", [(), (VOCABULARY,), (-1,), (3, 2**70), (True,), (1.0,)])
def test_ids_that_are_none_are_refused(engine: PagedEngine, ids: Any) -> None:
    with pytest.raises(InvalidRequest):
        engine.submit(request(ids), BlockingMailbox())


def test_a_prompt_longer_than_the_context_is_refused_before_any_work(engine: PagedEngine) -> None:
    with pytest.raises(ContextLengthExceeded):
        engine.submit(request([5] * 256), BlockingMailbox())
    assert engine.stats().waiting == 0


def test_min_tokens_above_max_tokens_is_refused(engine: PagedEngine) -> None:
    with pytest.raises(InvalidRequest):
        engine.submit(request(GOOD, max_tokens=2, min_tokens=3), BlockingMailbox())


def test_a_top_k_beyond_the_vocabulary_means_all_of_it(engine: PagedEngine) -> None:
    messages = run_one(engine, request(GOOD, top_k=10**6, max_tokens=3, seed=1, ignore_eos=True))
    same = run_one(engine, request(GOOD, max_tokens=3, seed=1, ignore_eos=True))
    assert ids_of(messages) == ids_of(same)


# -- lengths and ends ------------------------------------------------------------------------------


def test_an_answer_ends_at_the_contexts_end(engine: PagedEngine) -> None:
    messages = run_one(engine, request([5] * 250, temperature=0.0, ignore_eos=True))
    assert len(ids_of(messages)) == 6 and SequenceEnded("length", 0) in messages


def test_a_stop_id_ends_with_stop_and_is_delivered(engine: PagedEngine) -> None:
    free = ids_of(run_one(engine, request(GOOD, temperature=0.0, max_tokens=12, ignore_eos=True)))
    stop = free[5]
    asked = GenerationRequest(
        Prompt(tuple(GOOD)),
        Sampling(temperature=0.0, max_tokens=12, ignore_eos=True),
        stop_ids=frozenset({stop}),
    )
    messages = run_one(engine, asked)
    assert ids_of(messages) == free[: free.index(stop) + 1]
    assert SequenceEnded("stop", 0) in messages


def test_min_tokens_holds_the_end_back(engine: PagedEngine) -> None:
    bias = ((EOS, 100.0),)
    short = run_one(engine, request(GOOD, temperature=0.0, logit_bias=bias))
    assert ids_of(short) == [EOS]
    longer = ids_of(run_one(engine, request(GOOD, temperature=0.0, logit_bias=bias, min_tokens=4)))
    assert len(longer) == 5 and longer[4] == EOS and EOS not in longer[:4]


def test_the_ends_counts_are_right(engine: PagedEngine) -> None:
    last = ended(run_one(engine, request(GOOD, max_tokens=5, n=3, ignore_eos=True)))
    assert (last.prompt_tokens, last.completion_tokens) == (len(GOOD), 15)
    assert 0 < last.first_token_seconds <= last.total_seconds


def test_a_seed_gives_the_same_tokens_alone_and_beside_others(engine: PagedEngine) -> None:
    asked = request(GOOD, seed=42, max_tokens=20, ignore_eos=True, n=2)
    alone = run_one(engine, asked)
    crowd = [request(GOOD[i:], temperature=1.5, max_tokens=30) for i in range(1, 12)]
    beside = run_all(engine, [*crowd[:6], asked, *crowd[6:]])[6]
    assert [ids_of(alone, c) for c in (0, 1)] == [ids_of(beside, c) for c in (0, 1)]
    assert ids_of(alone, 0) != ids_of(alone, 1)
    fresh = [ids_of(run_one(engine, request(GOOD, max_tokens=20, ignore_eos=True))) for _ in "ab"]
    assert fresh[0] != fresh[1]


def test_scores_come_with_their_ids(engine: PagedEngine) -> None:
    messages = run_one(engine, request(GOOD, temperature=0.0, logprobs=3, max_tokens=4))
    for message in messages:
        if isinstance(message, Tokens):
            (score,) = message.scores
            assert score.top[0] == (message.ids[0], score.logprob) and len(score.top) == 3


# -- cancel ----------------------------------------------------------------------------------------


def test_cancel_ends_a_running_a_waiting_and_a_hung_request(model: Any) -> None:
    engine = engine_of(model, max_running=1)
    boxes = [BlockingMailbox() for _ in range(3)]
    numbers = [engine.submit(request(GOOD, ignore_eos=True), box) for box in boxes]
    next(iter(boxes[0]))
    for number in (numbers[2], numbers[0], numbers[0], 999):
        engine.cancel(number)
    assert ended(list(boxes[2])).outcome == "cancelled"
    assert ended(list(boxes[0])).outcome == "cancelled"
    engine.cancel(numbers[1])
    assert ended(list(boxes[1])).outcome == "cancelled" and is_at_baseline(engine)
    engine.close()


def test_cancelling_one_choice_leaves_the_others(engine: PagedEngine) -> None:
    box = BlockingMailbox()
    number = engine.submit(request(GOOD, max_tokens=40, n=3, ignore_eos=True), box)
    reading, seen = iter(box), []
    while not any(isinstance(m, Tokens) and m.choice == 1 for m in seen):
        seen.append(next(reading))
    engine.cancel(number, 1)
    seen += list(reading)
    assert {m.choice for m in seen if isinstance(m, SequenceEnded)} == {0, 2}
    assert len(ids_of(seen, 0)) == len(ids_of(seen, 2)) == 40 > len(ids_of(seen, 1))
    assert ended(seen).outcome == "finished"


def test_cancelling_the_first_choice_before_it_ran_still_runs_the_others(model: Any) -> None:
    engine = engine_of(model, max_running=1)
    first, box = BlockingMailbox(), BlockingMailbox()
    blocker = engine.submit(request(GOOD, ignore_eos=True), first)
    number = engine.submit(request(GOOD, max_tokens=5, n=2, ignore_eos=True), box)
    engine.cancel(number, 0)
    engine.cancel(blocker)
    messages = list(box)
    assert ids_of(messages, 0) == [] and len(ids_of(messages, 1)) == 5
    assert ended(messages).outcome == "finished"
    engine.close()


# -- faults ----------------------------------------------------------------------------------------


def test_a_step_that_raises_fails_its_own_requests_and_the_engine_goes_on(
    engine: PagedEngine, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(chunks: Any, real: Any) -> None:
        raise ValueError("secret path /root/x")

    fault = Fault(engine, explode, after=3)
    failed = ended(run_one(engine, request(GOOD, ignore_eos=True)))
    assert failed.outcome == "failed" and isinstance(failed.error, EngineFailed)
    assert "secret" not in failed.error.message and "secret" in caplog.text
    fault.after = 10**9
    assert ended(run_one(engine, request(GOOD, max_tokens=2))).outcome == "finished"
    assert is_at_baseline(engine)


def test_logits_that_are_not_finite_fail_one_row_only(engine: PagedEngine) -> None:
    def poison(chunks: Any, real: Any) -> torch.Tensor:
        logits: torch.Tensor = real(chunks)
        drawing = [c.sequence for c in chunks if c.draws]
        for row, sequence in enumerate(drawing):
            if sequence.request.generation.tenant == "ill" and sequence.drawn == 3:
                logits[row, 5] = float("nan")
        return logits

    Fault(engine, poison)
    ill, well = run_all(
        engine,
        [request(GOOD, tenant="ill", ignore_eos=True), request(GOOD, max_tokens=20, tenant="well")],
    )
    assert ended(ill).outcome == "failed" and len(ids_of(ill)) == 3
    assert ended(well).outcome == "finished"


def test_out_of_memory_once_costs_time_and_no_request(engine: PagedEngine) -> None:
    raised = []

    def squeeze(chunks: Any, real: Any) -> None:
        if len(chunks) > 2 and not raised:
            raised.append(len(chunks))
            raise torch.OutOfMemoryError("CUDA out of memory")

    Fault(engine, squeeze)
    asked = [request(GOOD[i:], temperature=0.0, max_tokens=10, ignore_eos=True) for i in range(4)]
    answers = run_all(engine, asked)
    assert raised and [ended(a).outcome for a in answers] == ["finished"] * 4
    clean = engine_of(tiny("llama"))
    assert [ids_of(a) for a in run_all(clean, asked)] == [ids_of(a) for a in answers]
    clean.close()


def test_out_of_memory_twice_fails_the_largest_request_only(engine: PagedEngine) -> None:
    def squeeze(chunks: Any, real: Any) -> None:
        if any(chunk.end > 120 for chunk in chunks):
            raise MemoryError

    Fault(engine, squeeze)
    large, small = run_all(
        engine, [request([7] * 150, ignore_eos=True), request(GOOD, max_tokens=5)]
    )
    assert isinstance(ended(large).error, OutOfMemory)
    assert ended(small).outcome == "finished" and is_at_baseline(engine)


class FickleGrammar:
    """A grammar whose part named `at` raises."""

    def __init__(self, at: str) -> None:
        self.at = at

    def matcher(self) -> FickleGrammar:
        return self._maybe("matcher", self)

    def fill(self, bitmask: Any, row: int) -> bool:
        return self._maybe("fill", False)

    def accept(self, token: int) -> None:
        self._maybe("accept", None)

    def is_finished(self) -> bool:
        return self._maybe("is_finished", False)

    def _maybe(self, name: str, value: Any) -> Any:
        if name == self.at:
            raise ValueError(name)
        return value


@pytest.mark.parametrize("at", ["matcher", "fill", "accept", "is_finished"])
def test_a_grammar_that_raises_fails_its_own_request_only(engine: PagedEngine, at: str) -> None:
    bound = GenerationRequest(
        Prompt(tuple(GOOD)), Sampling(max_tokens=9, ignore_eos=True), grammar=FickleGrammar(at)
    )
    bad, good = run_all(engine, [bound, request(GOOD, max_tokens=9, ignore_eos=True)])
    assert ended(bad).outcome == "failed" and ended(good).completion_tokens == 9


def test_a_step_that_hangs_shows_in_the_stats(engine: PagedEngine) -> None:
    go = threading.Event()
    Fault(engine, lambda chunks, real: go.wait(10) and None)
    box = BlockingMailbox()
    engine.submit(request(GOOD, max_tokens=2), box)
    time.sleep(0.3)
    assert engine.stats().last_step_age_seconds > 0.2
    go.set()
    assert ended(list(box)).outcome == "finished"
    for _ in range(100):
        if engine.stats().last_step_age_seconds == 0.0:
            return
        time.sleep(0.01)
    raise AssertionError("an idle engine still counts a step")


# -- the queue -------------------------------------------------------------------------------------


def test_a_full_queue_refuses_with_a_wait_and_recovers(model: Any) -> None:
    engine = engine_of(model, max_running=1, max_waiting=2)
    boxes = [BlockingMailbox() for _ in range(6)]
    numbers: list[int] = []
    refused: list[Overloaded] = []
    first = engine.submit(request(GOOD, ignore_eos=True), boxes[0])
    next(iter(boxes[0]))
    for box in boxes[1:]:
        try:
            numbers.append(engine.submit(request(GOOD, max_tokens=2), box))
        except Overloaded as error:
            refused.append(error)
    assert len(numbers) == 2 and len(refused) == 3
    assert all(error.retry_after and error.retry_after >= 1 for error in refused)
    engine.cancel(first)
    for box in boxes[1:3]:
        assert ended(list(box)).outcome == "finished"
    assert ended(run_one(engine, request(GOOD, max_tokens=2))).outcome == "finished"
    engine.close()


def test_a_queue_is_bounded_by_prompt_tokens_too(model: Any) -> None:
    engine = engine_of(model, max_running=1, max_waiting_tokens=100)
    box = BlockingMailbox()
    engine.submit(request(GOOD, ignore_eos=True), box)
    next(iter(box))
    engine.submit(request([4] * 90), BlockingMailbox())
    with pytest.raises(Overloaded):
        engine.submit(request([4] * 20), BlockingMailbox())
    engine.close()


def test_waiting_too_long_fails_and_waiting_is_told(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.engine.engine.TELL_WAITING_SECONDS", 0.01)
    engine = engine_of(model, max_running=1, queue_timeout=0.3)
    Fault(engine, lambda chunks, real: time.sleep(0.02))
    running, box = BlockingMailbox(), BlockingMailbox()
    number = engine.submit(request(GOOD, ignore_eos=True), running)
    engine.submit(request(GOOD), box)
    messages = list(box)
    assert isinstance(ended(messages).error, Overloaded)
    assert any(isinstance(m, Waiting) and m.ahead == 0 for m in messages)
    engine.cancel(number)
    assert ended(list(running)).outcome == "cancelled"
    engine.close()


def test_close_drains_then_cancels_and_refuses_new_ones(model: Any) -> None:
    engine = engine_of(model)
    quick, slow = BlockingMailbox(), BlockingMailbox()
    engine.submit(request(GOOD, max_tokens=3), quick)
    Fault(engine, lambda chunks, real: time.sleep(0.02))
    engine.submit(request(GOOD, ignore_eos=True), slow)
    closing = threading.Thread(target=engine.close, args=(0.6,))
    closing.start()
    time.sleep(0.05)
    with pytest.raises(Unavailable):
        engine.submit(request(GOOD), BlockingMailbox())
    assert ended(list(quick)).outcome == "finished"
    assert ended(list(slow)).outcome == "cancelled"
    closing.join(10)
    assert not engine.stats().is_alive
    engine.close()


def test_an_idle_engine_closes_at_once(model: Any) -> None:
    engine = engine_of(model)
    began = time.monotonic()
    engine.close(30)
    assert time.monotonic() - began < 5


# -- many at once ----------------------------------------------------------------------------------


class Steps:
    """Messages by the step that brought them."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def post(self, messages: Any) -> None:
        self.messages += messages


@pytest.mark.parametrize("length", [3, 16, 40])
def test_a_short_prompt_has_its_first_id_in_the_steps_its_length_takes(
    model: Any, length: int
) -> None:
    """While 7 others decode: one step for up to `prefill_chunk` ids, 3 for 40 of 16."""
    engine = engine_of(model)
    engine.close()  # its thread ends: the test makes the steps
    engine._is_closing = engine._is_stopped = False
    for index in range(7):
        engine.submit(request([3 + index] * 9, ignore_eos=True), Steps())
    while not all(s.has_prefilled for s in engine._scheduler.running) or engine.stats().waiting:
        engine.step()
    box, steps = Steps(), 0
    engine.submit(request([50] * length, temperature=0.0), box)
    while not any(isinstance(message, Tokens) for message in box.messages):
        engine.step()
        steps += 1
    assert steps == -(-length // 16) <= 3


SHARED = {tenant: [random.Random(tenant).randrange(3, VOCABULARY) for _ in range(14)]
          for tenant in "abc"}  # fmt: skip


def mixed(draw: random.Random, index: int) -> GenerationRequest:
    """Ids that hold the request's own mark, so that any mix-up would change the answer; half of
    them behind a beginning that all of a tenant share."""
    mark, tenant = [3 + index % 300, 3 + index // 300 % 300], draw.choice("abc")
    length = draw.choice([1, 3, 9, 20, 40])
    ids = draw.choice([[], SHARED[tenant]]) + (
        (mark + [draw.randrange(3, VOCABULARY)] * length) if draw.random() < 0.5 else mark * length
    )
    return request(
        ids,
        tenant=tenant,
        temperature=draw.choice([0.0, 0.0, 1.0]),
        top_p=draw.choice([1.0, 1.0, 0.8]),
        top_k=draw.choice([0, 0, 20]),
        min_p=draw.choice([0.0, 0.0, 0.05]),
        seed=index,
        max_tokens=draw.randrange(1, 8),
        n=draw.choice([1, 1, 1, 2]),
        logprobs=draw.choice([None, None, 2]),
        presence_penalty=draw.choice([0.0, 0.5]),
        repetition_penalty=draw.choice([1.0, 1.0, 1.2]),
        logit_bias=draw.choice([(), ((7, 4.0), (9, -4.0))]),
        stop_token_ids=draw.choice([(), (11, 12, 13)]),
    )


async def crowd(engine: PagedEngine, count: int, seed: int) -> dict[int, list[Message]]:
    """Submit `count` mixed requests, 48 in flight, cancelling some; what each answered."""
    draw = random.Random(seed)
    answers: dict[int, list[Message]] = {}
    room = asyncio.Semaphore(48)

    async def one(index: int, asked: GenerationRequest, cancels: bool) -> None:
        async with room:
            box = AsyncMailbox()
            number = engine.submit(asked, box)
            messages: list[Message] = []
            async for message in box:
                messages.append(message)
                if cancels and len(messages) == 2:
                    engine.cancel(number)
            answers[index] = messages

    asked = [(i, mixed(draw, i), draw.random() < 0.1) for i in range(count)]
    await asyncio.gather(*(one(*arguments) for arguments in asked))
    return answers


def check_crowd(engine: PagedEngine, count: int, compares: int) -> None:
    """Each answer is what the same request answers alone, and nothing is left behind."""
    answers = asyncio.run(crowd(engine, count, seed=5))
    assert len(answers) == count and is_at_baseline(engine)
    outcomes = [ended(messages).outcome for messages in answers.values()]
    assert "failed" not in outcomes and "finished" in outcomes and "cancelled" in outcomes
    draw, compared = random.Random(5), 0
    for index in range(count):
        asked, cancelled = mixed(draw, index), draw.random() < 0.1
        if not cancelled and index % max(1, count // compares) == 0:
            alone = run_one(engine, asked)
            for choice in range(asked.sampling.n):
                assert ids_of(alone, choice) == ids_of(answers[index], choice), index
            compared += 1
    assert compared > compares // 2
    assert is_at_baseline(engine)
    engine._scheduler.check()
    engine.close()


CROWDED: dict[str, Any] = dict(max_running=24, prefill_chunk=64)


def test_500_mixed_requests_do_not_touch_each_other() -> None:
    check_crowd(engine_of(tiny("gpt_oss"), kv_cache_gb=0.0008, **CROWDED), 500, 60)


@pytest.mark.slow
def test_10000_mixed_requests_do_not_touch_each_other() -> None:
    check_crowd(engine_of(tiny("gpt_oss"), kv_cache_gb=0.0008, **CROWDED), 10_000, 1000)


@pytest.mark.slow
def test_10000_mixed_requests_through_compiled_steps_do_not_touch_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With inputs kept as precise as for a seed: greedy requests are compared too."""
    monkeypatch.setattr(decoder, "_MIN_WEIGHTS", 0)
    monkeypatch.setattr(decoder, "_TERMS", 3)
    engine = engine_of(tiny("llama"), packs_weights=True, kv_cache_gb=0.0006, **CROWDED)
    check_crowd(engine, 10_000, 1000)


def test_a_refusal_is_a_serve_error_with_its_own_code() -> None:
    assert issubclass(Overloaded, ServeError) and Overloaded.status == 429
