"""The engine one step ahead of the device: whatever comes and goes, answers are those of an engine
that waits, and those of a plain loop without any engine.

The steps are the real ones (staging, tables, rows, places) on a CPU. In the model's place stands a
function that reads every id of a sequence back through the block tables, so that one wrong slot,
table or row changes all later ids. The device is as late as it may be: it begins a launched step
only when somebody waits for it, and reads what the host has staged no sooner.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from serve.engine import gpu, sampling
from serve.engine.attention_gpu import KernelBackend
from serve.engine.cache import GroupSpec, KVCache
from serve.engine.config import EngineConfig
from serve.engine.engine import PagedEngine
from serve.engine.face import (
    BlockingMailbox,
    Ended,
    GenerationRequest,
    Message,
    Prompt,
    SequenceEnded,
)
from serve.engine.kernels.gpt_oss import Batch
from serve.engine.runner import Runner
from serve.engine.sizing import LayerShape
from serve.errors import EngineFailed
from serve.values import Sampling
from tests.engine_models import ended, ids_of, request

CPU = torch.device("cpu")
VOCABULARY, BLOCK, CONTEXT, EOS = 24, 4, 64, 1
WINDOWS = (None, 6)


def logits_of(ids: Iterable[int]) -> Tensor:
    """What the model says after these ids: every one of them counts, and where it stands."""
    held = list(ids)
    seed = hash((tuple(held), tuple(held[-6:]))) % 2**32
    return torch.from_numpy(np.random.default_rng(seed).normal(size=VOCABULARY) * 1.5).float()


class ReadBack:
    """A step whose cache holds the ids themselves, one pool for each group."""

    def __init__(self, blocks: int) -> None:
        self.pools = [np.full(blocks * BLOCK, -7) for _ in WINDOWS]
        self.ill: set[int] = set()  # ids after which nothing finite is computed

    def __call__(self, batch: Batch, rows: Tensor | None) -> Tensor:
        ids = batch.ids.numpy()
        for pool, slots in zip(self.pools, batch.slots, strict=True):
            for token, slot in zip(ids, slots.numpy(), strict=True):
                if slot >= 0:
                    pool[slot] = token
        wanted = range(len(ids)) if rows is None else rows.tolist()
        return torch.stack([self._row(batch, row) for row in wanted] or [torch.empty(0)])

    def _row(self, batch: Batch, row: int) -> Tensor:
        start = batch.query_start.numpy()
        sequence = int(np.searchsorted(start, row, side="right")) - 1
        length = int(batch.lengths[sequence]) - int(start[sequence + 1]) + row + 1
        if length <= 0:
            return torch.zeros(VOCABULARY)
        full, window = (
            [int(pool[int(table[sequence, at // BLOCK]) * BLOCK + at % BLOCK]) for at in seen]
            for pool, table, seen in zip(
                self.pools, batch.tables, (range(length), range(max(0, length - 6), length)),
                strict=True,
            )
        )  # fmt: skip
        assert full[-6:] == window, "the groups disagree"
        if full[-1] in self.ill:
            return torch.full((VOCABULARY,), float("nan"))
        return logits_of(full)


def draw_plainly(logits: Tensor, temperatures: Tensor, noise: Tensor, out: Tensor) -> None:
    for row, (own, temperature, at) in enumerate(
        zip(logits, temperatures.tolist(), noise.tolist(), strict=True)
    ):
        hot = own / temperature if temperature > 0 else own
        token = sampling._invert(hot[None], [at])[0] if temperature > 0 else own.argmax()
        out[row] = int(token) if bool(own.isfinite().all()) else -1


def follow_plainly(given: Tensor, sources: Tensor, drawn: Tensor, ids: Tensor) -> None:
    ids.copy_(torch.where(sources < 0, given, drawn[sources.clamp(min=0)].clamp(min=0)))


class LateSteps(gpu.GpuSteps):
    """No graphs; everything launched waits in line until somebody asks for it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.line: deque[tuple[int, int]] = deque()
        self.deepest = 0
        self.launches = 0

    def _enqueue(self, place: int, count: int) -> None:
        self.line.append((place, count))
        self.deepest = max(self.deepest, len(self.line))
        self.launches += 1

    def _wait(self, place: int) -> None:
        while any(place == waiting for waiting, _ in self.line):
            at, count = self.line.popleft()
            self._inputs.push(at)
            for tables in self._tables:
                tables.push(at)
            self._made = self._compute(self._size(count))
            self._out[at, :count].copy_(self._drawn[:count])

    def _logits(self, size: int) -> Tensor:
        return self._made

    def _mixed(self, *args: Any) -> Tensor:
        assert not self.line, "a step that is waited for began before one under way was read"
        return super()._mixed(*args)


class Embeddings:
    class weight:
        shape = (VOCABULARY, 1)


class Named:
    def get_input_embeddings(self) -> type[Embeddings]:
        return Embeddings


@pytest.fixture(autouse=True, scope="module")
def plain_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "draw", draw_plainly)
        patch.setattr(gpu, "follow", follow_plainly)
        yield


class Bench:
    """An engine without its thread: the test calls `step`."""

    def __init__(self, runs_ahead: bool = True, blocks: int = 60, **options: Any) -> None:
        config = EngineConfig(
            max_running=5, prefill_chunk=8, block_size=BLOCK, runs_ahead=runs_ahead, **options
        )
        groups = tuple(GroupSpec(window, (i,), blocks) for i, window in enumerate(WINDOWS))
        shapes = [LayerShape(i, 1, 1, 1, window) for i, window in enumerate(WINDOWS)]
        backend = KernelBackend(shapes, groups, BLOCK, torch.float32, CPU)
        self.model = ReadBack(blocks)
        self.steps = LateSteps(self.model, backend, [CONTEXT // BLOCK + 1] * 2, 5)
        runner = Runner(Named(), backend, BLOCK, CPU, steps=self.steps)
        cache = KVCache(groups, BLOCK, CONTEXT + 1)
        self.engine = PagedEngine(
            runner, cache, config,
            eos_ids=frozenset({EOS}), context_length=CONTEXT, vocabulary=VOCABULARY,
        )  # fmt: skip
        self.boxes: dict[int, BlockingMailbox] = {}

    def submit(self, asked: GenerationRequest) -> int:
        box = BlockingMailbox()
        number = self.engine.submit(asked, box)
        self.boxes[number] = box
        return number

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.engine.step()
            self.engine._scheduler.check()

    def finish(self) -> None:
        for _ in range(5000):
            engine = self.engine
            if not (engine._inbox or engine._scheduler.has_work or engine._launched):
                break
            self.step()
        stats = self.engine.stats()
        assert not stats.running and not stats.waiting, "work is left"
        assert stats.kv_blocks_free == stats.kv_blocks_total and not self.steps.line

    def read(self, number: int) -> list[Message]:
        """All that was posted by now."""
        box = self.boxes[number]
        found: list[Message] = []
        while not box._messages.empty():
            found.append(box._messages.get())
        return found


def alone(asked: GenerationRequest, choice: int = 0) -> list[int]:
    """The answer by a plain loop."""
    o, ids = asked.sampling, list(asked.prompt.ids)
    seed = sampling.mix((o.seed or 0) % 2**64) ^ choice
    ends = set(asked.stop_ids) | (set() if o.ignore_eos else {EOS})
    room = CONTEXT - len(ids)
    limit = room if o.max_tokens is None else min(room, o.max_tokens)
    drawn: list[int] = []
    while len(drawn) < limit and not (drawn and drawn[-1] in ends):
        noise = torch.tensor([sampling.uniform(seed, len(drawn))], dtype=torch.float32)
        out = torch.empty(1, dtype=torch.int64)
        logits = logits_of([*ids, *drawn])[None]
        draw_plainly(logits, torch.tensor([o.temperature]), noise, out)
        drawn.append(int(out))
    return drawn


requests = st.builds(
    lambda length, tenant, seed, **options: GenerationRequest(
        Prompt(tuple((i * 7 + seed) % 20 + 3 for i in range(length))),
        Sampling(seed=seed, **options),
        tenant=str(tenant),
        stop_ids=frozenset({seed % 20 + 3}),
    ),
    length=st.integers(1, 30),
    tenant=st.integers(0, 1),
    seed=st.integers(0, 5),
    temperature=st.sampled_from([0.0, 1.0]),
    max_tokens=st.sampled_from([1, 2, 5, 20, None]),
    ignore_eos=st.booleans(),
    n=st.sampled_from([1, 1, 1, 3]),
)
moves = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), requests),
        st.tuples(st.just("ask"), requests),
        st.tuples(st.just("step"), st.integers(1, 12)),
        st.tuples(st.just("cancel"), st.integers(0, 99), st.sampled_from([None, 0, 1])),
    ),
    max_size=24,
)


@settings(max_examples=60, deadline=None)
@given(moves, st.sampled_from([24, 30, 60]))
def test_whatever_comes_and_goes_answers_are_a_plain_loops(
    moves: list[tuple[Any, ...]], blocks: int
) -> None:
    bench = Bench(blocks=blocks)
    asked: dict[int, GenerationRequest] = {}
    cancelled: set[tuple[int, int | None]] = set()
    for move in moves:
        match move:
            case ("ask", wanted):
                asked[bench.submit(wanted)] = wanted
            case ("step", times):
                bench.step(times)
            case ("cancel", which, choice) if asked:
                number = list(asked)[which % len(asked)]
                cancelled.add((number, choice))
                bench.engine.cancel(number, choice)
    bench.finish()
    for number, wanted in asked.items():
        messages = bench.read(number)
        for choice in range(wanted.sampling.n):
            found, right = ids_of(messages, choice), alone(wanted, choice)
            is_cut = {(number, None), (number, choice)} & cancelled
            assert found == (right[: len(found)] if is_cut else right)
        last = ended(messages)
        assert last.outcome != "failed"
        assert last.completion_tokens == sum(len(ids_of(messages, c)) for c in range(8))


def test_rows_that_need_more_than_a_temperature_are_waited_for_and_right() -> None:
    """Mixed with plain ones that join and leave; the engine that always waits is the measure."""

    def run(runs_ahead: bool) -> tuple[Bench, list[list[int]]]:
        bench = Bench(runs_ahead)
        numbers = []
        for i in range(14):
            shaped: dict[str, Any] = [{}, {"top_k": 5}, {"logprobs": 2}, {}][i % 4]
            shaped |= {"presence_penalty": 0.5} if i % 5 == 0 else {}
            numbers.append(
                bench.submit(request([3 + i, 4, 5], seed=i, max_tokens=3 + 2 * i, **shaped))
            )
            bench.step(3)
        bench.finish()
        return bench, [ids_of(bench.read(n)) for n in numbers]

    ahead, found = run(True)
    waiting, right = run(False)
    assert found == right
    assert ahead.steps.deepest == 2 and waiting.steps.deepest == 1


def test_the_next_step_is_launched_before_the_last_ones_ids_are_read() -> None:
    bench = Bench()
    bench.submit(request([5, 6, 7], temperature=0.0, max_tokens=20, ignore_eos=True))
    bench.finish()
    assert bench.steps.deepest == 2
    assert bench.steps.launches == 19, "an end by length is foreseen: no step is wasted"


def test_an_end_shows_one_step_late_and_costs_one_id_that_nobody_sees() -> None:
    wanted = next(
        r for r in (request([3, s], temperature=1.0, seed=s) for s in range(99))
        if 5 < len(alone(r)) < 30
    )  # fmt: skip
    bench = Bench()
    number = bench.submit(wanted)
    bench.finish()
    messages = bench.read(number)
    assert ids_of(messages) == alone(wanted) and SequenceEnded("stop", 0) in messages
    assert bench.steps.launches == len(alone(wanted))  # the prompt's step drew the first


def test_a_cancel_is_answered_within_two_steps() -> None:
    bench = Bench()
    number = bench.submit(request([5, 6, 7], max_tokens=50, ignore_eos=True, seed=1))
    other = bench.submit(request([8, 9], max_tokens=50, ignore_eos=True, seed=1))
    bench.step(7)
    bench.engine.cancel(number)
    bench.step(2)
    last = ended(bench.read(number))
    assert last.outcome == "cancelled"
    bench.finish()
    assert ended(bench.read(other)).completion_tokens == 50


def test_numbers_that_are_not_finite_fail_their_own_request_though_a_step_is_under_way() -> None:
    bench = Bench()
    ill = request([5, 6], temperature=1.0, seed=3, max_tokens=30, ignore_eos=True)
    well = request([9, 10], temperature=1.0, seed=8, max_tokens=30, ignore_eos=True)
    known = set(alone(well)) | {9, 10}
    bench.model.ill = {next(i for i in alone(ill) if i not in known)}
    numbers = [bench.submit(ill), bench.submit(well)]
    bench.finish()
    failed, fine = (bench.read(n) for n in numbers)
    assert isinstance(ended(failed).error, EngineFailed)
    right = alone(ill)
    assert ids_of(failed) == right[: right.index(*bench.model.ill) + 1]
    assert ids_of(fine) == alone(well)


def test_a_launch_that_fails_is_run_and_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    real, calls = bench.steps.launch, []

    def launch(*args: Any) -> int:
        calls.append(1)
        if len(args) == 5 and len(calls) % 4 == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    bench.steps.launch = launch  # type: ignore[method-assign]
    asked = [request([4 + i, 5], seed=i, max_tokens=15, ignore_eos=True) for i in range(3)]
    numbers = [bench.submit(one) for one in asked]
    bench.finish()
    assert [ids_of(bench.read(n)) for n in numbers] == [alone(one) for one in asked]
    assert "could not be launched" in caplog.text


def test_a_step_that_fails_when_it_is_read_ends_its_requests_and_no_others() -> None:
    bench = Bench()
    real, left = bench.steps.take, [3]

    def take(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("an illegal memory access")
        return real(*args)

    bench.steps.take = take  # type: ignore[method-assign]
    first = bench.submit(request([4, 5], seed=1, max_tokens=30, ignore_eos=True))
    bench.step(6)
    later = request([6, 5], seed=2, max_tokens=9)
    number = bench.submit(later)
    bench.finish()
    assert ended(bench.read(first)).outcome == "failed"
    assert ids_of(bench.read(number)) == alone(later)


def test_its_thread_reads_a_step_whose_requests_are_all_gone_before_it_rests() -> None:
    bench = Bench()
    bench.engine.start()
    number = bench.submit(request([5, 6, 7], seed=1, ignore_eos=True))
    next(iter(bench.boxes[number]))
    bench.engine.cancel(number)
    assert isinstance(list(bench.boxes[number])[-1], Ended)
    until = time.monotonic() + 10
    while (bench.engine._launched or bench.steps.line) and time.monotonic() < until:
        time.sleep(0.01)
    assert bench.engine._launched is None and not bench.steps.line
    bench.engine.close()
