"""What stands around an answer: sealed reasoning, truncation, pictures, several prompts."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.engine.scripted import HANG, Say, ScriptedEngine
from serve.errors import EngineFailed, Overloaded
from serve.formats.base import Rendered
from serve.service import ServedModel, Service
from serve.values import (
    Accepted,
    Capabilities,
    ChatRequest,
    ChoiceFinished,
    Event,
    Failed,
    Finished,
    ImagePart,
    ModelCard,
    Sampling,
    TextDelta,
    Usage,
)
from serve.wire.seal import Seal
from serve.wire.together import together
from tests.fakes import CALL, END, SAY, THINK, ByteFormat, ids
from tests.serving import Served, serving, settings_in

HELLO = [THINK, Say(ids("hm")), SAY, Say(ids("Hello")), END]
PNG = base64.b64encode(
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x02\x00\x00\x00\x03\x08\x02\x00\x00\x00"
).decode()


class RecordingFormat(ByteFormat):
    """Keeps the requests it renders; every message's text counts towards the prompt."""

    def __init__(self) -> None:
        self.seen: list[ChatRequest] = []

    def render(self, request: ChatRequest) -> Rendered:
        self.seen.append(request)
        text = "".join(message.text for message in request.messages)
        last = replace(request.messages[-1], parts=())
        rendered = super().render(replace(request, messages=[last]))
        return replace(rendered, prompt=replace(rendered.prompt, ids=tuple(text.encode())))


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine(HELLO, eos_ids={END}, context_length=200)


@pytest.fixture(scope="module")
def form() -> RecordingFormat:
    return RecordingFormat()


def service_of(engine: ScriptedEngine, form: ByteFormat, vision: bool | None = None) -> Service:
    service = Service("tiny/model")
    can = replace(form.capabilities(), vision=vision)
    made = Sampling(temperature=0.25, top_p=0.75)
    card = ModelCard("tiny/model", engine.context_length, can, defaults=made)
    service.attach(ServedModel(card, form, engine))
    return service


@pytest.fixture(scope="module")
def served(
    engine: ScriptedEngine, form: RecordingFormat, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with serving(service_of(engine, form), settings_in(tmp_path_factory.mktemp("a"))) as served:
        yield served


@pytest.fixture
def client(served: Served, engine: ScriptedEngine) -> Iterator[httpx.Client]:
    engine.script = HELLO
    with served.client() as client:
        yield client


def respond(client: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/responses", json={"store": False, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_response_tells_the_sampling_it_was_drawn_with(
    client: httpx.Client, engine: ScriptedEngine
) -> None:
    left_open = respond(client, input="hi")
    assert (left_open["temperature"], left_open["top_p"]) == (0.25, 0.75)
    said = respond(client, input="hi", temperature=0.5)
    assert (said["temperature"], said["top_p"]) == (0.5, 0.75)
    assert engine.submitted[-1].sampling.temperature == 0.5


class UnreasoningFormat(RecordingFormat):
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities(), reasoning=False, efforts=())


def test_an_effort_is_harmless_to_a_model_that_does_not_reason_and_the_answer_says_so(
    engine: ScriptedEngine, tmp_path: Path
) -> None:
    engine.script = [SAY, Say(ids("Hello")), END]
    form = UnreasoningFormat()
    talk = {"messages": [{"role": "user", "content": "hi"}]}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {**talk, "reasoning_effort": "high"}),
        ("/v1/chat/completions", {**talk, "chat_template_kwargs": {"reasoning_effort": "low"}}),
        ("/v1/responses", {"input": "hi", "store": False, "reasoning": {"effort": "medium"}}),
    ]
    with serving(service_of(engine, form), settings_in(tmp_path)) as served:
        with served.client() as client:
            for path, body in asked:
                answer = client.post(path, json=body)
                assert answer.status_code == 200, answer.text
                assert answer.headers["x-ignored-fields"] == "reasoning_effort"
                assert form.seen[-1].reasoning_effort is None and not form.seen[-1].template_options
            none = client.post(asked[0][0], json={**talk, "reasoning_effort": "none"})
            assert none.status_code == 200 and "x-ignored-fields" not in none.headers
            wrong = client.post(asked[0][0], json={**talk, "reasoning_effort": "hihg"})
            assert wrong.status_code == 400


# ---- sealed reasoning ---------------------------------------------------------------------------


def test_encrypted_reasoning_comes_back_to_the_model_and_tells_nobody_anything(
    client: httpx.Client, served: Served, form: RecordingFormat
) -> None:
    first = respond(client, input="hi", include=["reasoning.encrypted_content"])
    thought = first["output"][0]
    sealed = thought["encrypted_content"]
    assert base64.b64encode(b"hm").decode() not in sealed
    carried = {**thought, "content": [], "summary": []}
    again = [{"role": "user", "content": "hi"}, carried, *first["output"][1:],
             {"role": "user", "content": "and?"}]  # fmt: skip
    respond(client, input=again)
    assert form.seen[-1].messages[1].reasoning == "hm"
    with served.client(served.keys.guest_key("192.0.2.1")) as guest:
        stolen = guest.post("/v1/responses", json={"input": again})
    assert form.seen[-1].messages[1].reasoning == ""
    assert "encrypted_content" in stolen.headers["x-ignored-fields"]


def test_a_seal_opens_for_its_tenant_and_secret_only() -> None:
    seal = Seal(b"secret")
    sealed = seal.close("thought", "t")
    assert seal.open(sealed, "t") == "thought"
    assert seal.close("thought", "t") != sealed
    assert Seal(b"other").open(sealed, "t") is None
    for wrong, tenant in ((sealed, "u"), (sealed[:-4], "t"), ("é", "t"), ("", "t")):
        assert seal.open(wrong, tenant) is None


# ---- items --------------------------------------------------------------------------------------


def test_an_assistants_neighbouring_items_are_one_turn(
    client: httpx.Client, form: RecordingFormat
) -> None:
    call = {"type": "function_call", "name": "f", "arguments": "{}"}
    respond(client, instructions="be brief", input=[
        {"role": "user", "content": "q"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r1"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        {**call, "call_id": "1"}, {**call, "call_id": "2"},
        {"type": "function_call_output", "call_id": "1", "output": "one"},
        {"type": "function_call_output", "call_id": "2", "output": {"two": 2}},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "r2"}]},
        {"role": "assistant", "content": "b"}, {"role": "user", "content": "more"},
    ])  # fmt: skip
    told = form.seen[-1].messages
    assert [m.role for m in told] == ["system", "user", "assistant", "tool", "tool", "assistant",
                                      "user"]  # fmt: skip
    turn = told[2]
    assert (turn.reasoning, turn.text, [c.id for c in turn.tool_calls]) == ("r1", "a", ["1", "2"])
    assert [m.text for m in told[3:5]] == ["one", '{"two": 2}']
    assert (told[5].reasoning, told[5].text) == ("r2", "b")


def test_a_custom_tools_input_is_told_raw_and_comes_back_as_its_argument(
    client: httpx.Client, engine: ScriptedEngine, form: RecordingFormat
) -> None:
    engine.script = [CALL, Say(ids('patch({"input":"*** Begin"}')), END]
    answer = respond(client, input="hi", tools=[{"type": "custom", "name": "patch"}])
    item = answer["output"][0]
    assert (item["type"], item["input"]) == ("custom_tool_call", "*** Begin")
    engine.script = HELLO
    result = {"type": "custom_tool_call_output", "call_id": item["call_id"], "output": "done"}
    history = [{"role": "user", "content": "hi"}, item, result]
    respond(client, tools=[{"type": "custom", "name": "patch"}], input=history)
    call = form.seen[-1].messages[1].tool_calls[0]
    assert (call.name, json.loads(call.arguments)) == ("patch", {"input": "*** Begin"})


def test_truncation_auto_drops_the_oldest_turns_that_do_not_fit_and_disabled_refuses(
    client: httpx.Client, form: RecordingFormat
) -> None:
    turns = [{"role": "user", "content": f"{i}" * 50} for i in range(6)]
    long = [{"role": "system", "content": "s" * 20}, *turns]
    refused = client.post("/v1/responses", json={"input": long})
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    respond(client, input=long, truncation="auto", max_output_tokens=20)
    kept = form.seen[-1].messages
    assert [m.role for m in kept] == ["system", "user", "user", "user"]
    assert [m.text[0] for m in kept[1:]] == ["3", "4", "5"]


# ---- pictures -----------------------------------------------------------------------------------

PICTURE = [{"role": "user", "content": [
    {"type": "text", "text": "what is it?"},
    {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}]}]  # fmt: skip


def test_a_picture_for_a_model_that_sees_nothing_is_refused_or_told_in_words(
    engine: ScriptedEngine, tmp_path: Path
) -> None:
    blind = RecordingFormat()
    for fallback, status in (("refuse", 400), ("drop", 200)):
        settings = settings_in(tmp_path, image_fallback=fallback)
        with serving(service_of(engine, blind, vision=False), settings) as served:
            with served.client() as client:
                answer = client.post("/v1/chat/completions", json={"messages": PICTURE})
        assert answer.status_code == status
    assert not blind.seen[-1].messages[0].images
    assert "cannot see it" in blind.seen[-1].messages[0].text


def test_a_picture_for_a_model_that_sees_arrives_and_an_address_is_not_fetched_unless_allowed(
    engine: ScriptedEngine, tmp_path: Path
) -> None:
    seeing = RecordingFormat()
    address = [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/a.png"}}]}]  # fmt: skip
    for is_allowed in (False, True):
        settings = settings_in(tmp_path, allow_image_urls=is_allowed)
        with serving(service_of(engine, seeing, vision=True), settings) as served:
            with served.client() as client:
                assert client.post("/v1/chat/completions", json={"messages": PICTURE}).is_success
                refused = client.post("/v1/chat/completions", json={"messages": address})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "messages[0].content[0].image_url.url"
        image = seeing.seen[-1].messages[0].images[0]
        assert isinstance(image, ImagePart) and image.data == base64.b64decode(PNG)


# ---- several prompts ----------------------------------------------------------------------------


async def told(*events: Event) -> AsyncGenerator[Event]:
    for event in events:
        await asyncio.sleep(0)
        yield event


def all_of(*streams: AsyncGenerator[Event], n: int = 1) -> list[Event]:
    async def collect() -> list[Event]:
        return [event async for event in together(streams, n)]

    return asyncio.run(collect())


def one(text: str, tokens: int = 3) -> AsyncGenerator[Event]:
    return told(Accepted(tokens), TextDelta(text), ChoiceFinished("stop"),
                Finished(Usage(tokens, 1)))  # fmt: skip


def test_streams_together_have_one_beginning_one_end_and_their_own_choices() -> None:
    events = all_of(one("a", 3), one("b", 4), n=2)
    assert events[0] == Accepted(7)
    assert sorted((e.choice, e.text) for e in events if isinstance(e, TextDelta)) == [
        (0, "a"), (2, "b")]  # fmt: skip
    assert [e for e in events if isinstance(e, Finished)] == [events[-1]]
    assert events[-1].usage == Usage(7, 2)  # type: ignore[union-attr]


def test_the_first_failure_ends_all_and_closes_the_others() -> None:
    closed: list[bool] = []

    async def endless() -> AsyncGenerator[Event]:
        try:
            yield Accepted(1)
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    error = Overloaded("full", retry_after=1)
    assert all_of(endless(), told(Failed(error))) == [Failed(error)]
    assert closed == [True]


def test_a_stream_that_raises_still_ends_the_whole() -> None:
    async def broken() -> AsyncGenerator[Event]:
        yield Accepted(1)
        raise RuntimeError("a fault of ours")

    events = all_of(broken(), one("a"))
    assert isinstance(events[-1], Failed) and isinstance(events[-1].error, EngineFailed)


def test_prompts_that_cannot_all_be_taken_are_refused_together(
    client: httpx.Client, engine: ScriptedEngine
) -> None:
    engine.capacity = 2
    engine.script = [Say(ids("x")), HANG]
    try:
        answer = client.post("/v1/completions", json={"prompt": ["a", "b", "c"], "stream": True})
        assert answer.status_code == 429
        assert engine.wait_until_idle(5)
    finally:
        engine.capacity = None


def test_capabilities_are_told_in_the_model_list(client: httpx.Client) -> None:
    told = client.get("/v1/models").json()["data"][0]
    assert told["context_length"] == 200 and told["is_loaded"]
    assert Capabilities(**told["capabilities"]).tools is True
