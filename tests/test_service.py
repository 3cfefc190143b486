"""The one path: every request's events in order, exactly one terminal event, work cancelled when
unwanted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from serve.engine.scripted import HANG, Say, ScriptedEngine
from serve.errors import (
    ContextLengthExceeded,
    EngineFailed,
    Forbidden,
    InvalidRequest,
    ModelLoading,
    ModelNotFound,
    Overloaded,
    Unavailable,
)
from serve.service import Service
from serve.values import (
    Accepted,
    ChatRequest,
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    Message,
    PassedOver,
    Progress,
    Queued,
    ReasoningDelta,
    Sampling,
    TextDelta,
    TextPart,
    TextRequest,
    is_terminal,
)
from tests.fakes import END, SAY, THINK, ByteFormat, ids, service_with


def ask(text: str = "hi", **sampling: object) -> ChatRequest:
    return ChatRequest(
        [Message("user", (TextPart(text),))],
        Sampling(**sampling),  # type: ignore[arg-type]
    )


def events_of(service: Service, request: ChatRequest | TextRequest) -> list[Event]:
    async def collect() -> list[Event]:
        stream = (
            service.chat(request) if isinstance(request, ChatRequest) else service.complete(request)
        )
        return [event async for event in stream]

    events = asyncio.run(collect())
    assert [is_terminal(event) for event in events].count(True) == 1
    assert is_terminal(events[-1])
    return events


def said(events: list[Event], choice: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, TextDelta) and e.choice == choice)


def test_events_come_in_order_and_end_once() -> None:
    script = [THINK, Say(ids("hm")), SAY, Say(ids("Hello")), END]
    events = events_of(service_with(ScriptedEngine(script, eos_ids={END})), ask("question"))
    assert events[0] == Accepted(len("question"))
    assert "".join(e.text for e in events if isinstance(e, ReasoningDelta)) == "hm"
    assert said(events) == "Hello"
    assert events[-2] == ChoiceFinished("stop")
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.usage.prompt_tokens == 8
    assert end.usage.completion_tokens == len(script) + len("hm") + len("Hello") - 2
    assert end.usage.reasoning_tokens == 2


def test_max_tokens_ends_with_length() -> None:
    engine = ScriptedEngine([Say(ids("abcdef"))], eos_ids={END})
    events = events_of(service_with(engine), ask(max_tokens=3))
    assert said(events) == "abc"
    assert ChoiceFinished("length") in events


def test_a_stop_string_ends_the_choice_counts_no_further_and_cancels_the_work() -> None:
    engine = ScriptedEngine([Say(ids("one. two")), HANG], eos_ids={END})
    events = events_of(service_with(engine), ask(stop=(".",)))
    assert said(events) == "one"
    assert ChoiceFinished("stop") in events
    end = events[-1]
    assert isinstance(end, Finished) and end.usage.completion_tokens == len("one.")
    assert engine.running == 0


def test_with_several_choices_a_stop_string_ends_only_its_own() -> None:
    script = [Say(ids("a.xx"), choice=0), Say(ids("bcde"), choice=1), END]
    events = events_of(
        service_with(ScriptedEngine(script, eos_ids={END})), ask(n=2, stop=(".",), max_tokens=9)
    )
    assert (said(events, 0), said(events, 1)) == ("a", "bcde")
    assert {e.choice for e in events if isinstance(e, ChoiceFinished)} == {0, 1}


def test_an_error_in_the_middle_is_the_terminal_event() -> None:
    engine = ScriptedEngine([Say(ids("ab")), EngineFailed("The step failed.")])
    events = events_of(service_with(engine), ask())
    assert said(events) == "ab"
    assert isinstance(events[-1], Failed) and isinstance(events[-1].error, EngineFailed)


@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        (ScriptedEngine(refusal=Overloaded("full", retry_after=3)), Overloaded),
        (ScriptedEngine(context_length=4), ContextLengthExceeded),
        (ScriptedEngine(refusal=Unavailable("draining")), Unavailable),
    ],
)
def test_a_refused_request_has_the_failure_as_its_only_event(
    engine: ScriptedEngine, kind: type[Exception]
) -> None:
    events = events_of(service_with(engine), ask("a long prompt"))
    assert len(events) == 1
    assert isinstance(events[0], Failed) and isinstance(events[0].error, kind)


def test_what_the_format_refuses_never_reaches_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ByteFormat, request: ChatRequest) -> None:
        raise InvalidRequest("Roles must alternate.", param="messages")

    monkeypatch.setattr(ByteFormat, "render", refuse)
    engine = ScriptedEngine([END])
    events = events_of(service_with(engine), ask())
    assert isinstance(events[0], Failed) and events[0].error.param == "messages"
    assert engine.submitted == []


def test_places_in_the_queue_are_passed_on() -> None:
    from serve.engine.face import Waiting

    engine = ScriptedEngine([Waiting(2, 1.5), Say(ids("x")), END], eos_ids={END})
    assert Queued(2, 1.5) in events_of(service_with(engine), ask())


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.005)
    return condition()


def test_closing_the_iterator_cancels_the_work() -> None:
    engine = ScriptedEngine([Say(ids("abc")), HANG])
    service = service_with(engine)

    async def read_a_little() -> None:
        async with contextlib.aclosing(service.chat(ask())) as stream:
            async for event in stream:
                if isinstance(event, TextDelta):
                    break

    asyncio.run(read_a_little())
    assert wait_for(lambda: engine.running == 0)
    assert engine.cancelled


def test_a_cancelled_task_cancels_the_work_even_before_the_first_token() -> None:
    engine = ScriptedEngine([HANG])
    service = service_with(engine)

    async def give_up() -> None:
        async def consume() -> None:
            async for _ in service.chat(ask()):
                pass

        task = asyncio.create_task(consume())
        await asyncio.sleep(0.2)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    assert wait_for(lambda: engine.running == 0)


def test_a_raw_prompt_goes_the_same_way() -> None:
    engine = ScriptedEngine([Say(ids("more")), END], eos_ids={END})
    events = events_of(service_with(engine), TextRequest("once", Sampling(max_tokens=9)))
    assert said(events) == "more"
    assert engine.submitted[0].prompt.ids == ids("once")


@pytest.mark.parametrize("name", ["tiny/model", "default", "gpt-oss:20b"])
def test_the_model_answers_to_its_id_the_default_and_the_public_name(name: str) -> None:
    assert service_with(ScriptedEngine()).model(name).id == "tiny/model"


def test_another_model_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ModelNotFound, match="tiny/model, default, gpt-oss:20b") as caught:
        service_with(ScriptedEngine()).model("gpt-4")
    assert caught.value.param == "model"


def test_while_the_model_loads_requests_are_told_when_to_come_back() -> None:
    service = Service("some/model")
    service.report(Progress("downloading", seconds_left=42.0))
    with pytest.raises(ModelLoading) as caught:
        service.model("default")
    assert caught.value.retry_after == 42.0
    assert not service.status().is_ready


def test_a_failed_load_points_to_ready() -> None:
    service = Service("some/model")
    service.report(Progress("failed"))
    with pytest.raises(Unavailable, match="/ready"):
        service.model("default")


def test_an_offered_model_is_switched_to_by_who_may() -> None:
    service = service_with(ScriptedEngine([END], eos_ids={END}))
    service.offer(["tiny/model", "other/model"])
    asked = ChatRequest([Message("user", (TextPart("hi"),))], model="other/model")
    refused = events_of(service, asked)[0]
    assert isinstance(refused, Failed) and isinstance(refused.error, Forbidden)
    told = events_of(service, replace(asked, may_switch=True))[0]
    assert isinstance(told, Failed) and isinstance(told.error, ModelLoading)
    assert service.wait_for_switch() == "other/model"
    assert service.status().offered == ("tiny/model", "other/model")
    assert service.status().wanted == "other/model" and not service.status().is_ready
    waits = events_of(service, replace(asked, model="default"))[0]
    assert isinstance(waits, Failed) and isinstance(waits.error, ModelLoading)


def test_a_switch_that_two_asked_for_is_done_once_and_one_to_what_serves_not_at_all() -> None:
    service = service_with(ScriptedEngine([END], eos_ids={END}))
    served = service.detach()
    assert served is not None
    service.switch("tiny/model")
    service.switch("tiny/model")
    assert service.wait_for_switch() == "tiny/model"
    service.attach(served)
    service.switch("tiny/model")
    service.close()
    assert service.wait_for_switch() is None
    assert service.status().wanted == "" and service.status().is_ready


def test_models_held_at_once_each_answer_to_their_id_and_switching_is_instant() -> None:
    first, second = (ScriptedEngine([Say(ids(word)), END], eos_ids={END}) for word in "ab")
    service = service_with(first)
    kept = service.detach()
    assert kept is not None
    service.attach(kept)
    service.offer(["tiny/model", "other/model"])
    service.switch("other/model")
    assert service.wait_for_switch() == "other/model"
    named = replace(ask(), model="tiny/model")
    assert said(events_of(service, named)) == "a"  # while the other is being loaded
    card = replace(kept.card, id="other/model")
    service.attach(replace(kept, card=card, engine=second))
    assert said(events_of(service, named)) == "a"
    assert said(events_of(service, replace(named, model="other/model"))) == "b"
    assert said(events_of(service, replace(named, model="default"))) == "b"
    assert [c.id for c in service.models()] == ["other/model", "tiny/model"]
    assert service.status().loaded == ("tiny/model", "other/model")
    service.switch("tiny/model")
    assert service.status().is_ready and service.models()[0].id == "tiny/model"
    assert said(events_of(service, replace(named, model="default"))) == "a"
    taken = [one.card.id for one in iter(service.detach, None)]
    assert sorted(taken) == ["other/model", "tiny/model"] and service.models() == ()


def test_what_could_not_be_loaded_beside_a_model_leaves_it_serving() -> None:
    service = service_with(ScriptedEngine([END], eos_ids={END}))
    service.offer(["tiny/model", "other/model"])
    service.switch("other/model")
    service.wait_for_switch()
    service.fail("other/model: the disk is full")
    assert service.status().is_ready and service.status().wanted == ""
    assert "disk is full" in service.status().progress.detail


def test_trying_again_forgets_why_the_first_try_failed() -> None:
    service = Service("some/model")
    service.pass_over(PassedOver("some/model", "out of reach"))
    service.fail("No model could be loaded.")
    service.load_again()
    assert service.wait_for_switch() == ""
    assert service.status().passed_over == () and service.status().progress.phase == "starting"


def test_a_detached_model_ends_what_runs_and_takes_no_more() -> None:
    engine = ScriptedEngine([Say(ids("a")), 0.3, Say(ids("b")), END], eos_ids={END})
    service = service_with(engine)

    async def detach_in_the_middle() -> tuple[list[Event], list[Event]]:
        events: list[Event] = []
        async for event in service.chat(ask()):
            events.append(event)
            if said(events) == "a":
                service.detach()
        return events, [event async for event in service.chat(ask())]

    before, after = asyncio.run(detach_in_the_middle())
    assert said(before) == "ab" and isinstance(before[-1], Finished)
    assert isinstance(after[0], Failed) and isinstance(after[0].error, ModelLoading)


def test_what_the_caller_left_open_is_sampled_as_the_models_makers_say() -> None:
    engine = ScriptedEngine([END], eos_ids={END})
    service = service_with(engine, defaults=Sampling(temperature=0.2, top_p=0.9, top_k=40))
    events_of(service, ask(top_p=0.5, unset=("temperature", "top_k")))
    drawn = engine.submitted[0].sampling
    assert (drawn.temperature, drawn.top_p, drawn.top_k) == (0.2, 0.5, 40)
