"""The official Python SDK against a running server; its own types validate every answer and chunk,
strictly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion import Completion
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from serve.engine.scripted import HANG, Say, ScriptedEngine
from serve.errors import EngineFailed
from tests.fakes import CALL, END, SAY, THINK, ids, service_with
from tests.serving import OWNER, Served, serving, settings_in

HELLO = [THINK, Say(ids("hm")), SAY, Say(ids("Hel")), Say(ids("lo")), END]
CALLS = [THINK, Say(ids("so")), CALL, Say(ids('look({"a":')), Say(ids("1}")), CALL,
         Say(ids('look({"a":2}')), END]  # fmt: skip
USER = [{"role": "user", "content": "hi"}]
FLAT_TOOL = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": False}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine(HELLO, eos_ids={END}, cached_tokens=1)


@pytest.fixture(scope="module")
def served(engine: ScriptedEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(service_with(engine), settings_in(tmp_path_factory.mktemp("sdk"))) as served:
        yield served


@pytest.fixture
def client(served: Served, engine: ScriptedEngine) -> Iterator[OpenAI]:
    engine.script = HELLO
    with OpenAI(
        base_url=f"{served.base}/v1",
        api_key=OWNER,
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        yield client


def raw(served: Served, path: str, body: dict[str, Any]) -> httpx.Response:
    with served.client() as client:
        return client.post(path, json=body)


def data_of(text: str) -> list[dict[str, Any]]:
    found = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in found if line != "[DONE]"]


# ---- chat ---------------------------------------------------------------------------------------


def test_a_chat_completion(client: OpenAI) -> None:
    answer = client.chat.completions.create(model="default", messages=USER)
    message = answer.choices[0].message
    assert message.content == "Hello" and message.tool_calls is None
    assert message.reasoning == "hm"  # type: ignore[attr-defined]
    assert answer.usage and answer.usage.completion_tokens_details
    assert answer.usage.completion_tokens_details.reasoning_tokens == 2
    assert answer.usage.prompt_tokens_details
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.system_fingerprint and answer.system_fingerprint.startswith("fp_")


def test_a_chat_stream(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="default", messages=USER, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello"
    assert chunks[-1].usage and not chunks[-1].choices


@pytest.mark.parametrize("script", [HELLO, CALLS])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("logprobs", [False, True])
def test_every_chat_answer_and_chunk_is_of_the_sdks_types_to_the_letter(
    served: Served, engine: ScriptedEngine, script: list[Any], n: int, logprobs: bool
) -> None:
    engine.script = script
    body = {"messages": USER, "n": n, "logprobs": logprobs, "tools": [TOOL]}
    if logprobs:
        body["top_logprobs"] = 2
    whole = raw(served, "/v1/chat/completions", body)
    ChatCompletion.model_validate_json(whole.content, strict=True)
    stream = raw(served, "/v1/chat/completions", {**body, "stream": True})
    for chunk in data_of(stream.text):
        ChatCompletionChunk.model_validate_json(json.dumps(chunk), strict=True)


def test_the_sdks_stream_helper_puts_tool_calls_together(
    client: OpenAI, engine: ScriptedEngine
) -> None:
    engine.script = CALLS
    with client.chat.completions.stream(model="default", messages=USER, tools=[TOOL]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    calls = final.choices[0].message.tool_calls
    assert calls and [call.function.arguments for call in calls] == ['{"a":1}', '{"a":2}']
    assert final.choices[0].finish_reason == "tool_calls"
    assert "tool_calls.function.arguments.delta" in kinds


class Answer(BaseModel):
    city: str


def test_the_sdks_parse_helper(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.script = [Say(ids('{"city":"Paris"}')), END]
    answer = client.chat.completions.parse(model="default", messages=USER, response_format=Answer)
    assert answer.choices[0].message.parsed == Answer(city="Paris")
    response = client.responses.parse(model="default", input="hi", text_format=Answer)
    assert response.output_parsed == Answer(city="Paris")


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny/model"]
    assert client.models.retrieve("tiny/model").object == "model"


# ---- errors as the SDK shows them ---------------------------------------------------------------


def test_an_error_has_code_param_and_message(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="default", messages=USER, temperature=9)
    assert wrong.value.param == "temperature" and wrong.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=USER)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_an_error_inside_a_stream_reaches_the_caller_with_its_message(
    client: OpenAI, engine: ScriptedEngine
) -> None:
    engine.script = [Say(ids("ab")), EngineFailed('It "broke".')]
    stream = client.chat.completions.create(model="default", messages=USER, stream=True)
    with pytest.raises(openai.APIError, match='It "broke".') as wrong:
        list(stream)
    assert wrong.value.code == "engine_error"


def test_the_sdk_does_not_repeat_a_request_that_failed_here(
    served: Served, engine: ScriptedEngine
) -> None:
    engine.script = [EngineFailed("no")]
    engine.submitted.clear()
    with OpenAI(base_url=f"{served.base}/v1", api_key=OWNER, max_retries=2) as client:
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="default", messages=USER)
    assert len(engine.submitted) == 1


# ---- responses ----------------------------------------------------------------------------------


def test_a_response(client: OpenAI) -> None:
    answer = client.responses.create(model="default", input="hi")
    assert answer.output_text == "Hello" and answer.status == "completed"
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    assert answer.usage and answer.usage.output_tokens_details.reasoning_tokens == 2
    assert answer.usage.input_tokens_details.cached_tokens == 1


RESPONSE_CASES: list[tuple[list[Any], dict[str, Any]]] = [
    (HELLO, {}),
    (CALLS, {"tools": [FLAT_TOOL]}),
    (HELLO, {"max_output_tokens": 4}),
    (HELLO, {"top_logprobs": 2, "include": ["message.output_text.logprobs"]}),
    (HELLO, {"include": ["reasoning.encrypted_content"], "store": False}),
    ([CALL, Say(ids('patch({"input":"a b"}')), END],
     {"tools": [{"type": "custom", "name": "patch"}]}),
    ([CALL, Say(ids("go({}")), END],
     {"tools": [{"type": "namespace", "name": "ns", "description": "d", "tools":
                 [{"type": "function", "name": "go", "parameters": None, "strict": False}]}]}),
    ([Say(ids("ab")), EngineFailed("no")], {}),
    ([END], {"instructions": "be brief", "metadata": {"a": "b"}, "user": "u",
             "reasoning": {"effort": "high", "summary": "auto"}, "text": {"verbosity": "low"}}),
]  # fmt: skip


@pytest.mark.parametrize(("script", "extra"), RESPONSE_CASES)
def test_every_response_and_event_is_of_the_sdks_types_to_the_letter(
    served: Served, engine: ScriptedEngine, script: list[Any], extra: dict[str, Any]
) -> None:
    engine.script = script
    body = {"model": "default", "input": "hi", **extra}
    whole = raw(served, "/v1/responses", body)
    if whole.status_code == 200:
        Response.model_validate_json(whole.content, strict=True)
    stream = raw(served, "/v1/responses", {**body, "stream": True})
    events = data_of(stream.text)
    for event in events:
        EVENT.validate_json(json.dumps(event), strict=True)
    names = [line[7:] for line in stream.text.split("\n") if line.startswith("event: ")]
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert names[:2] == ["response.created", "response.in_progress"]
    assert names[-1] in ("response.completed", "response.incomplete", "response.failed")
    assert sum(name in ("response.completed", "response.incomplete", "response.failed")
               for name in names) == 1  # fmt: skip


def test_a_response_stream_through_the_sdks_helper(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.script = CALLS
    with client.responses.stream(model="default", input="hi", tools=[FLAT_TOOL]) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    calls = [item for item in final.output if item.type == "function_call"]
    assert [call.arguments for call in calls] == ['{"a":1}', '{"a":2}']


def test_a_conversation_goes_on_from_a_stored_response(
    client: OpenAI, engine: ScriptedEngine
) -> None:
    first = client.responses.create(model="default", input="one")
    again = client.responses.retrieve(first.id)
    assert again.output_text == first.output_text
    second = client.responses.create(
        model="default", input="two", previous_response_id=first.id, instructions="short"
    )
    items = client.responses.input_items.list(second.id, order="asc")
    listed = items.model_dump()["data"]
    ResponseItemList.model_validate(items.model_dump(), strict=True)
    assert [item["type"] for item in listed] == ["message", "reasoning", "message", "message"]
    assert second.previous_response_id == first.id
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as broken:
        client.responses.create(model="default", input="three", previous_response_id=second.id)
    assert broken.value.code == "previous_response_not_found"


def test_a_running_response_can_be_cancelled_from_elsewhere(
    client: OpenAI, engine: ScriptedEngine
) -> None:
    engine.script = [Say(ids("ab")), HANG]
    with client.responses.create(model="default", input="hi", stream=True) as stream:
        events = iter(stream)
        created = next(events)
        assert created.type == "response.created"
        for event in events:
            if event.type == "response.output_text.delta":
                break
        running = client.responses.retrieve(created.response.id)
        assert running.status == "in_progress"
        cancelled = client.responses.cancel(created.response.id)
        assert cancelled.status == "cancelled" and cancelled.output_text == "ab"
        assert [event.type for event in events][-1] == "response.incomplete"
    assert engine.wait_until_idle()
    assert client.responses.retrieve(created.response.id).status == "cancelled"


def test_input_tokens(client: OpenAI) -> None:
    assert client.responses.input_tokens.count(model="default", input="four").input_tokens == 4


# ---- completions --------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["ab", ["ab", "cd"], [1, 2], [[1, 2], [3]]])
@pytest.mark.parametrize("extra", [{}, {"n": 2, "logprobs": 2}])
def test_every_completion_and_chunk_is_of_the_sdks_type_to_the_letter(
    served: Served, engine: ScriptedEngine, prompt: Any, extra: dict[str, Any]
) -> None:
    engine.script = [Say(ids("Hi")), END]
    body = {"model": "default", "prompt": prompt, **extra}
    whole = Completion.model_validate_json(
        raw(served, "/v1/completions", body).content, strict=True
    )
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    assert len(whole.choices) == prompts * extra.get("n", 1)
    assert {choice.text for choice in whole.choices} == {"Hi"}
    stream = raw(served, "/v1/completions", {**body, "stream": True})
    for chunk in data_of(stream.text):
        loose = {**chunk, "choices": [{**c, "finish_reason": c["finish_reason"] or "stop"}
                                      for c in chunk["choices"]]}  # fmt: skip
        Completion.model_validate_json(json.dumps(loose), strict=True)


def test_a_completion_echoes_and_stops_after_sixteen_tokens(
    client: OpenAI, engine: ScriptedEngine
) -> None:
    engine.script = [Say(ids("x" * 50)), END]
    answer = client.completions.create(model="default", prompt="ab", echo=True)
    assert answer.choices[0].text == "ab" + "x" * 16
    assert answer.choices[0].finish_reason == "length"
    # OpenAI's own chunks say finish_reason null, which the SDK's type does not allow.
    with OpenAI(base_url=str(client.base_url), api_key=OWNER) as plain:
        chunks = list(
            plain.completions.create(model="default", prompt="ab", echo=True, stream=True)
        )
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_stored_responses_survive_a_restart_and_belong_to_their_key(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    service = service_with(ScriptedEngine(HELLO, eos_ids={END}))
    with serving(service, settings) as served, served.client() as client:
        made = client.post("/v1/responses", json={"input": "hi"}).json()
    with serving(service, settings) as served:
        with served.client() as client:
            assert client.get(f"/v1/responses/{made['id']}").json() == made
        with served.client(served.keys.guest_key("192.0.2.7")) as guest:
            assert guest.get(f"/v1/responses/{made['id']}").status_code == 404
            body = {"input": "hi", "previous_response_id": made["id"]}
            assert guest.post("/v1/responses", json=body).status_code == 400
