"""An answer in the making: phases, texts, numbers; strings that only grow."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from serve.errors import OutOfMemory
from serve.ui.answer import Answer
from serve.values import (
    Accepted,
    Cancelled,
    ChoiceFinished,
    ContentEvent,
    Failed,
    Finished,
    Queued,
    ReasoningDelta,
    TextDelta,
    Timing,
    ToolCallDelta,
    ToolCallStarted,
    Usage,
)

content: st.SearchStrategy[ContentEvent] = st.one_of(
    st.builds(TextDelta, st.text()), st.builds(ReasoningDelta, st.text())
)


def test_phases_follow_the_events() -> None:
    answer = Answer("a")
    seen = []
    for event in (
        Accepted(5),
        Queued(2, 15.0),
        Queued(0),
        ReasoningDelta("hm"),
        TextDelta("Hi"),
        ToolCallStarted(0, "c0", "f"),
        ToolCallDelta(0, "{}"),
        ChoiceFinished("tool_calls"),
        Finished(Usage(5, 11), Timing(0.5, 1.5)),
    ):
        answer.take(event)
        seen.append(answer.snapshot()["phase"])
    assert seen == [
        "reading", "queued", "reading", "thinking", "answering", "calling", "calling", "calling",
        "done",
    ]  # fmt: skip
    stats = answer.snapshot()["stats"]
    assert stats["tokens_per_second"] == 10.0
    assert stats["first_token_seconds"] == 0.5
    assert answer.calls == [{"id": "c0", "name": "f", "arguments": "{}"}]


def test_the_seconds_of_thought_end_with_the_first_word() -> None:
    times = iter([10.0, 17.0, 99.0])
    answer = Answer("a", clock=lambda: next(times))
    answer.take(ReasoningDelta("hm"))
    assert answer.snapshot()["thought_seconds"] is None
    answer.take(TextDelta("Hi"))
    answer.take(TextDelta("!"))
    assert answer.snapshot()["thought_seconds"] == 7.0


def test_a_failure_keeps_what_was_said_and_gives_its_code_and_words() -> None:
    answer = Answer("a")
    answer.take(TextDelta("Well"))
    answer.take(Failed(OutOfMemory("It did not fit.", retry_after=3)))
    snapshot = answer.snapshot()
    assert (snapshot["phase"], snapshot["text"]) == ("failed", "Well")
    assert snapshot["error"] == {
        "code": "out_of_memory",
        "message": "It did not fit.",
        "retry_after": 3,
    }


def test_a_cancelled_answer_is_stopped_and_one_cut_by_its_length_says_so() -> None:
    stopped, cut = Answer(), Answer()
    stopped.take(Cancelled())
    cut.take(ChoiceFinished("length"))
    assert stopped.snapshot()["phase"] == "stopped" and not stopped.snapshot()["cut"]
    assert cut.snapshot()["cut"]


@given(st.text(), st.lists(content))
def test_every_snapshot_is_json_and_its_texts_only_grow(
    start: str, events: list[ContentEvent]
) -> None:
    answer = Answer("a", start)
    before = answer.snapshot()
    for event in events:
        answer.take(event)
        now = json.loads(json.dumps(answer.snapshot()))
        assert now["text"].startswith(before["text"])
        assert now["reasoning"].startswith(before["reasoning"])
        before = now
    said = "".join(e.text for e in events if isinstance(e, TextDelta))
    assert answer.text == start + said
