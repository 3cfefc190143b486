"""The scripted engine keeps the face's contract, so that tests above it mean something."""

from __future__ import annotations

import pytest

from serve.engine.face import (
    BlockingMailbox,
    Ended,
    GenerationRequest,
    Message,
    Prompt,
    SequenceEnded,
    Tokens,
    Waiting,
)
from serve.engine.scripted import HANG, Say, Script, ScriptedEngine
from serve.errors import EngineFailed, Overloaded
from serve.values import Sampling


def play(script: Script, sampling: Sampling | None = None, **options: object) -> list[Message]:
    engine = ScriptedEngine(script, **options)  # type: ignore[arg-type]
    mailbox = BlockingMailbox()
    request = GenerationRequest(Prompt((1, 2, 3)), sampling or Sampling())
    engine.submit(request, mailbox)
    messages = list(mailbox)
    assert sum(isinstance(m, Ended) for m in messages) == 1
    return messages


def ids_of(messages: list[Message], choice: int = 0) -> list[int]:
    tokens = [m for m in messages if isinstance(m, Tokens) and m.choice == choice]
    return [i for t in tokens for i in t.ids]


def test_a_script_is_said_in_order_and_ends_with_stop() -> None:
    messages = play([5, Say((6, 7)), Waiting(2)])
    assert ids_of(messages) == [5, 6, 7]
    assert messages[-2] == SequenceEnded("stop", 0)
    assert isinstance(messages[-1], Ended) and messages[-1].outcome == "finished"
    assert (messages[-1].prompt_tokens, messages[-1].completion_tokens) == (3, 3)


def test_max_tokens_and_end_ids_cut_the_script() -> None:
    assert ids_of(play([5, 6, 7], Sampling(max_tokens=2))) == [5, 6]
    assert ids_of(play([5, 9, 7], eos_ids=[9])) == [5, 9]
    assert ids_of(play([5, 9, 7], Sampling(ignore_eos=True), eos_ids=[9])) == [5, 9, 7]
    assert ids_of(play([Say((5, 9, 9))], Sampling(min_tokens=2), eos_ids=[9])) == [5, 9, 9]
    assert SequenceEnded("length", 0) in play([5, 6], Sampling(max_tokens=1))


def test_choices_can_speak_together_or_alone() -> None:
    messages = play([5, Say((6,), choice=1)], Sampling(n=2))
    assert (ids_of(messages, 0), ids_of(messages, 1)) == ([5], [5, 6])


def test_an_error_step_fails_the_request_in_the_middle() -> None:
    messages = play([5, EngineFailed("It broke.")])
    ended = messages[-1]
    assert isinstance(ended, Ended) and ended.outcome == "failed" and ended.error is not None


def test_a_hanging_request_ends_when_cancelled() -> None:
    engine = ScriptedEngine([5, HANG])
    mailbox = BlockingMailbox()
    number = engine.submit(GenerationRequest(Prompt((1,))), mailbox)
    assert next(iter(mailbox)) == Tokens((5,), 0)
    engine.cancel(number)
    ended = list(mailbox)
    assert len(ended) == 1 and isinstance(ended[0], Ended) and ended[0].outcome == "cancelled"
    assert engine.cancelled == [(number, None)] and engine.wait_until_idle()


def test_one_choice_can_be_cancelled_and_the_other_goes_on() -> None:
    engine = ScriptedEngine([5, 0.2, 6])
    mailbox = BlockingMailbox()
    number = engine.submit(GenerationRequest(Prompt((1,)), Sampling(n=2)), mailbox)
    reading = iter(mailbox)
    first = [next(reading), next(reading)]
    engine.cancel(number, 1)
    rest = list(reading)
    assert ids_of([*first, *rest], 0) == [5, 6] and ids_of([*first, *rest], 1) == [5]
    assert SequenceEnded("stop", 1) not in rest
    assert isinstance(rest[-1], Ended) and rest[-1].outcome == "finished"


def test_a_full_engine_refuses_and_posts_nothing() -> None:
    engine = ScriptedEngine([HANG], capacity=1)
    engine.submit(GenerationRequest(Prompt((1,))), BlockingMailbox())
    with pytest.raises(Overloaded):
        engine.submit(GenerationRequest(Prompt((1,))), BlockingMailbox())
    assert engine.running == 1 and len(engine.submitted) == 1
    engine.close()
    assert engine.running == 0
