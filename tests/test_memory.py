"""Thoughts between tool calls: put back where they were dropped, nowhere else, within bounds."""

from __future__ import annotations

import pytest

from serve import memory
from serve.memory import ThoughtMemory
from serve.values import (
    ChatRequest,
    ChoiceFinished,
    Message,
    ReasoningDelta,
    ReasoningPart,
    TextPart,
    ToolCallPart,
    ToolCallStarted,
)

CALL = ToolCallPart("call_1", "look", "{}")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def request(*parts: object, tenant: str = "t") -> ChatRequest:
    turn = Message("assistant", parts)  # type: ignore[arg-type]
    return ChatRequest([Message("user", (TextPart("q"),)), turn], tenant=tenant)


def told(kept: ThoughtMemory, *calls: str, choice: int = 0) -> None:
    recorder = kept.recorder("t")
    recorder.see(ReasoningDelta("I should ", choice))
    recorder.see(ReasoningDelta("look.", choice))
    for call in calls:
        recorder.see(ToolCallStarted(0, call, "look", choice))
    recorder.see(ChoiceFinished("tool_calls", choice))
    recorder.close()


def test_a_dropped_thought_is_put_back_before_its_calls() -> None:
    kept = ThoughtMemory()
    told(kept, "call_1")
    restored = kept.restore(request(CALL)).messages[1]
    assert restored.parts == (ReasoningPart("I should look."), CALL)


def test_a_thought_that_the_client_sent_itself_stays_the_clients() -> None:
    kept = ThoughtMemory()
    told(kept, "call_1")
    own = request(ReasoningPart("mine"), CALL)
    assert kept.restore(own).messages[1] == own.messages[1]


def test_nobody_else_gets_it_and_other_calls_have_none() -> None:
    kept = ThoughtMemory()
    told(kept, "call_1")
    other = request(CALL, tenant="somebody else")
    assert kept.restore(other).messages == tuple(other.messages)
    unknown = request(ToolCallPart("call_2", "look", "{}"))
    assert kept.restore(unknown).messages[1].reasoning == ""


def test_any_of_several_calls_finds_it_and_choices_keep_their_own() -> None:
    kept = ThoughtMemory()
    told(kept, "a", "b")
    assert kept.recall("t", "a") == kept.recall("t", "b") == "I should look."
    recorder = kept.recorder("t")
    recorder.see(ReasoningDelta("zero", 0))
    recorder.see(ReasoningDelta("one", 1))
    recorder.see(ToolCallStarted(0, "c", "look", 1))
    recorder.see(ChoiceFinished("stop", 0))
    recorder.see(ChoiceFinished("tool_calls", 1))
    assert kept.recall("t", "c") == "one"


def test_it_is_forgotten_after_an_hour_and_when_there_is_too_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    kept = ThoughtMemory(clock)
    kept.keep("t", "old", "thought")
    clock.now = memory.KEPT_SECONDS + 1
    assert kept.recall("t", "old") == ""
    kept.keep("t", "new", "thought")
    monkeypatch.setattr(memory, "MOST_CALLS_A_TENANT", 5)
    for i in range(20):
        kept.keep("t", f"c{i}", "x")
    assert kept.recall("t", "new") == "" and kept.recall("t", "c19") == "x"
    monkeypatch.setattr(memory, "MOST_CHARS", 100)
    kept.keep("u", "big", "y" * 100)
    assert kept.recall("t", "c19") == "" and kept.recall("u", "big") == "y" * 100
