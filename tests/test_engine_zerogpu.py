"""The per-request engine: the face's promises kept, in this process and through the real `spaces`
package with an emulated scheduler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.engine.face import (
    BlockingMailbox,
    Ended,
    GenerationRequest,
    Message,
    Prompt,
    SequenceEnded,
    Tokens,
)
from serve.engine.scripted import HANG, ScriptedEngine
from serve.engine.zerogpu import PerRequestEngine, duration, public, worker_task
from serve.errors import (
    ContextLengthExceeded,
    EngineFailed,
    Overloaded,
    RateLimited,
    Unavailable,
    Unsupported,
)
from serve.values import Sampling
from tests.fake_zerogpu import Scheduler, scheduling

ROOT = Path(__file__).parent.parent


def request(**sampling: Any) -> GenerationRequest:
    return GenerationRequest(Prompt((1, 2, 3)), Sampling(**sampling))


def engine(script: Any, **options: Any) -> PerRequestEngine:
    made = worker_task(lambda: ScriptedEngine(script))
    return PerRequestEngine(made, vocabulary=1000, context_length=100, **options)


def test_an_answer_comes_over_whole_with_one_end() -> None:
    mailbox = BlockingMailbox()
    per_request = engine([5, 6, 7])
    per_request.submit(request(), mailbox)
    messages = list(mailbox)
    assert [i for m in messages if isinstance(m, Tokens) for i in m.ids] == [5, 6, 7]
    ended = messages[-1]
    assert isinstance(ended, Ended) and ended.outcome == "finished"
    assert (ended.prompt_tokens, ended.completion_tokens) == (3, 3)
    assert 0 < ended.first_token_seconds <= ended.total_seconds
    assert per_request.stats().running == 0


def test_a_cancelled_request_ends_within_a_moment() -> None:
    mailbox = BlockingMailbox()
    per_request = engine([5, HANG])
    number = per_request.submit(request(), mailbox)
    threading.Timer(0.3, per_request.cancel, (number,)).start()
    assert [type(m) for m in mailbox][-1] is Ended


def test_a_cancelled_choice_says_nothing_more_and_the_other_goes_on() -> None:
    mailbox = BlockingMailbox()
    per_request = engine([5, 0.3, 6])
    number = per_request.submit(request(n=2), mailbox)
    per_request.cancel(number, 0)
    messages = list(mailbox)
    assert [m.choice for m in messages if isinstance(m, SequenceEnded)] == [1]
    assert isinstance(messages[-1], Ended) and messages[-1].outcome == "finished"


def test_what_the_worker_raises_is_one_failed_end() -> None:
    def breaks(_: GenerationRequest) -> Generator[list[Message], None, None]:
        yield [Tokens((5,))]
        raise RuntimeError("CUDA error at /root/secret/path")

    mailbox = BlockingMailbox()
    PerRequestEngine(breaks, vocabulary=9, context_length=9).submit(request(), mailbox)
    ended = list(mailbox)[-1]
    assert isinstance(ended, Ended) and isinstance(ended.error, EngineFailed)
    assert "secret" not in str(ended.error)


def test_a_worker_that_just_stops_is_a_failed_end() -> None:
    def stops(_: GenerationRequest) -> Generator[list[Message], None, None]:
        yield [Tokens((5,))]

    mailbox = BlockingMailbox()
    PerRequestEngine(stops, vocabulary=9, context_length=9).submit(request(), mailbox)
    ended = list(mailbox)[-1]
    assert isinstance(ended, Ended) and ended.outcome == "failed"


def test_what_cannot_run_is_refused_before_a_gpu_is_asked_for() -> None:
    per_request = engine([5, HANG], most=1)
    with pytest.raises(ContextLengthExceeded):
        per_request.submit(GenerationRequest(Prompt((1,) * 100)), BlockingMailbox())

    class Unportable:
        def __init__(self) -> None:
            self.matcher = threading.Lock()

    bound: Any = Unportable()
    with pytest.raises(Unsupported):
        per_request.submit(GenerationRequest(Prompt((1,)), grammar=bound), BlockingMailbox())
    mailbox = BlockingMailbox()
    per_request.submit(request(), mailbox)
    with pytest.raises(Overloaded):
        per_request.submit(request(), BlockingMailbox())
    per_request.close()
    assert isinstance(list(mailbox)[-1], Ended)
    with pytest.raises(Unavailable):
        per_request.submit(request(), BlockingMailbox())


@pytest.mark.parametrize(
    ("said", "becomes", "wait"),
    [
        ("You have exceeded your free ZeroGPU quota (60s left). Try again in 1:02:03. ",
         RateLimited, 3723),
        ("You have exceeded your ZeroGPU runs limit. ", RateLimited, 60),
        ("ZeroGPU illegal duration: larger than the maximum allowed", Unavailable, None),
        ("No GPU was available after 60s", Unavailable, 30),
        ("GPU task aborted", Unavailable, 30),
        ("ValueError", EngineFailed, None),
    ],
)  # fmt: skip
def test_the_platforms_refusals_become_the_apis_errors(
    said: str, becomes: type, wait: float | None
) -> None:
    error = public(RuntimeError(said))
    assert type(error) is becomes and error.retry_after == wait


def test_the_gpu_time_asked_for_grows_with_the_answer_and_has_an_end() -> None:
    assert duration(request(max_tokens=30)) < duration(request(max_tokens=900)) < 120
    assert duration(request(max_tokens=10**6)) == 120


# ---- through the real package ----


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    with scheduling() as running:
        yield running


def run_case(case: str, scheduler: Scheduler) -> list[dict[str, Any]]:
    environment = {
        **os.environ,
        "SPACES_ZERO_GPU": "true",
        "SPACES_ZERO_DEVICE_API_URL": scheduler.url,
        "PYTHONPATH": str(ROOT),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "zerogpu_process.py"), case],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=ROOT,
    )
    lines = [line[5:] for line in done.stdout.splitlines() if line.startswith("CASE ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(line) for line in lines]


def test_a_failure_in_the_worker_is_the_engines_own_error(scheduler: Scheduler) -> None:
    (case,) = run_case("fails", scheduler)
    assert (case["outcome"], case["error"], case["ids"]) == ("failed", "EngineFailed", [5])
    assert case["said"] == "it broke"


def test_a_cancel_reaches_the_worker_and_the_gpu_is_given_back(scheduler: Scheduler) -> None:
    (case,) = run_case("hangs", scheduler)
    assert case["outcome"] == "cancelled" and case["ids"] == [5]
    assert "/release" in [path for path, _ in scheduler.calls]
