"""Chat bodies read, and answers written: whole equals streamed, for any events."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from serve.errors import InvalidRequest, Unsupported
from serve.values import (
    Accepted,
    ChatRequest,
    ChoiceFinished,
    Event,
    Finished,
    ImagePart,
    Message,
    ReasoningDelta,
    ReasoningPart,
    TextDelta,
    TextPart,
    Timing,
    TokenLogprob,
    Tool,
    ToolCallDelta,
    ToolCallPart,
    ToolCallStarted,
    ToolChoice,
    Usage,
)
from serve.wire import chat, completions, responses
from serve.wire.body import Body, parse
from serve.wire.chat_answer import ChunkWriter, Fold, Head
from serve.wire.envelope import encode
from serve.wire.responses_answer import ResponseBuilder
from serve.wire.sse import joined

PNG = base64.b64encode(
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x02\x00\x00\x00\x03\x08\x02\x00\x00\x00"
).decode()
URL = f"data:image/png;base64,{PNG}"


def user(content: Any = "hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def ask(*messages: Any, **rest: Any) -> ChatRequest:
    return chat.read(Body({"messages": list(messages) or [user()], **rest})).request


def refusal(**rest: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as found:
        ask(**{"messages": [user()], **rest})
    return found.value


def function(name: str, **rest: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **rest}}


# ---- messages -----------------------------------------------------------------------------------


def test_content_may_be_a_string_null_or_parts_of_either_dialect() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, "c",
             {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
             {"type": "input_image", "image_url": URL}]  # fmt: skip
    message = ask(user(parts)).messages[0]
    assert message.text == "abc"
    first, second = message.images
    assert (first.media_type, first.detail, second.detail) == ("image/png", "low", "auto")
    assert ask({"role": "assistant", "content": None}, user()).messages[0].parts == ()


def test_an_image_address_is_kept_and_a_bad_data_url_is_a_400_naming_its_place() -> None:
    parts = [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]
    image = ask(user(parts)).messages[0].images[0]
    assert image == ImagePart(b"", url="https://example.org/a.png")
    assert image.where == "messages[0].content[0].image_url.url"
    for url in ("file:///etc/passwd", "data:image/png,abc", "data:image/png;base64,@@",
                "data:image/png;base64," + base64.b64encode(b"no picture").decode()):  # fmt: skip
        wrong = refusal(messages=[user([{"type": "image_url", "image_url": {"url": url}}])])
        assert wrong.param == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize("kind", ["input_audio", "file", "input_file", "video_url"])
def test_parts_that_cannot_be_read_are_refused_by_place(kind: str) -> None:
    wrong = refusal(messages=[user([{"type": kind, kind: {}}])])
    assert isinstance(wrong, Unsupported) and wrong.param == "messages[0].content[0]"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_is_read_under_each_of_its_names(name: str) -> None:
    turn = ask(user(), {"role": "assistant", "content": "x", name: "hm"}, user()).messages[1]
    assert turn.parts == (ReasoningPart("hm"), TextPart("x"))


def test_tool_calls_and_results_in_all_their_shapes() -> None:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "2", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
        {"id": "3", "type": "function", "function": {"name": "f", "arguments": None}},
        {"id": "4", "type": "function", "function": {"name": "f", "arguments": "{broken"}},
        {"id": "5", "type": "custom", "custom": {"name": "g", "input": "raw"}},
    ]
    request = ask(
        user(),
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "r"},
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "r"}]},
    )
    assert [call.arguments for call in request.messages[1].tool_calls] == [
        '{"a": 1}', '{"a": 1}', "", "{broken", '{"input": "raw"}',
    ]  # fmt: skip
    assert [m.tool_call_id for m in request.messages[2:]] == ["1", "2"]
    assert [m.text for m in request.messages[2:]] == ["r", "r"]


def test_legacy_function_calls_in_history_are_read() -> None:
    request = ask(
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "r"},
    )
    assert request.messages[0].tool_calls == (ToolCallPart("f", "f", "{}"),)
    assert request.messages[1] == Message("tool", (TextPart("r"),), "f", "f")


# ---- tools --------------------------------------------------------------------------------------


def test_tools_nested_flat_custom_namespaced_and_hosted_in_one_list() -> None:
    call = chat.read(Body({"messages": [user()], "tools": [
        function("a", description="d", parameters={"type": "object"}, strict=True),
        {"type": "function", "name": "b"},
        {"type": "custom", "custom": {"name": "c"}},
        {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "e"},
                                                     {"type": "function", "name": "b"}]},
        {"type": "web_search"},
    ]}))  # fmt: skip
    tools = call.request.tools
    assert [tool.name for tool in tools] == ["a", "b", "c", "e", "n__b"]
    assert tools[0] == Tool("a", "d", {"type": "object"}, True)
    assert call.ignored == ("tools[4].type=web_search",)


def test_the_same_tool_twice_is_one_and_two_different_of_one_name_are_a_400() -> None:
    assert len(ask(tools=[function("a"), {"type": "function", "name": "a"}]).tools) == 1
    assert "twice" in refusal(tools=[function("a"), function("a", description="x")]).message


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ("none", ToolChoice("none")),
        ("auto", ToolChoice()),
        ("required", ToolChoice("required")),
        (function("a"), ToolChoice("required", ("a",))),
        ({"type": "function", "name": "a"}, ToolChoice("required", ("a",))),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [function("a")]}},
         ToolChoice("auto", ("a",))),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"name": "b"}]},
         ToolChoice("required", ("b",))),
    ],
)  # fmt: skip
def test_tool_choice(choice: Any, wanted: ToolChoice) -> None:
    assert ask(tools=[function("a"), function("b")], tool_choice=choice).tool_choice == wanted


@pytest.mark.parametrize(
    "rest",
    [
        {"tool_choice": "required"},
        {"tools": [function("a")], "tool_choice": function("b")},
        {"tools": [function("a")], "tool_choice": {"type": "web_search_preview"}},
        {"tools": [function("a")], "tool_choice": "any"},
        {"tools": [function("a b")]},
        {"tools": [function("<|channel|>")]},
        {"tools": [function("")]},
        {"tools": [function("a", parameters="x")]},
        {"tools": ["a"]},
    ],
)
def test_wrong_tools_and_choices_are_a_400_naming_them(rest: Any) -> None:
    assert (refusal(**rest).param or "").startswith("tool")


# ---- numbers and limits -------------------------------------------------------------------------

HUGE = 10**400


def str_(value: Any) -> str:
    return str(value)[:12]


@pytest.mark.parametrize("value", [-0.1, 2.1, "1", True, [1], 1e400, float("inf"), HUGE], ids=str_)
def test_temperature_out_of_range_or_kind(value: Any) -> None:
    assert refusal(temperature=value).param == "temperature"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n", "seed", "top_k",
                                  "min_tokens", "top_logprobs"])  # fmt: skip
@pytest.mark.parametrize("value", [-(10**30), 10**30, 1.5, "1", True, float("inf"), HUGE], ids=str_)
def test_whole_numbers_out_of_range_or_kind(name: str, value: Any) -> None:
    assert refusal(**{name: value}).param == name


OVER: list[tuple[str, dict[str, Any]]] = [
    ("n", {"n": 9}),
    ("stop", {"stop": ["a"] * 17}),
    ("stop", {"stop": "a" * 257}),
    ("stop", {"stop": [""]}),
    ("logit_bias", {"logit_bias": {str(i): 1 for i in range(1025)}}),
    ("logit_bias", {"logit_bias": {"hello": 1}}),
    ("logit_bias.5", {"logit_bias": {"5": 101}}),
    ("top_logprobs", {"top_logprobs": 21, "logprobs": True}),
    ("top_logprobs", {"top_logprobs": 1}),
    ("messages", {"messages": [user()] * 2049}),
    ("messages[0].content", {"messages": [user([{"type": "text", "text": "a"}] * 513)]}),
    ("messages", {"messages": [user([{"type": "image_url", "image_url": {"url": URL}}] * 17)]}),
    ("tools", {"tools": [function(f"f{i}") for i in range(513)]}),
    ("metadata", {"metadata": {str(i): "x" for i in range(17)}}),
    ("metadata.a", {"metadata": {"a": "x" * 513}}),
    ("max_tokens", {"max_tokens": 5, "max_completion_tokens": 6}),
    ("min_tokens", {"max_tokens": 5, "min_tokens": 6}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("continue_final_message", {"continue_final_message": True}),
    ("add_generation_prompt", {"add_generation_prompt": False}),
    ("chat_template_kwargs.evil", {"chat_template_kwargs": {"evil": 1}}),
    ("response_format.type", {"response_format": {"type": "grammar"}}),
    ("response_format.json_schema.schema", {"response_format": {"type": "json_schema",
                                                                "json_schema": {"name": "a"}}}),
]  # fmt: skip


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(("param", "rest"), OVER)
def test_what_is_over_a_limit_or_inconsistent_is_a_400_naming_it(
    param: str, rest: dict[str, Any]
) -> None:
    assert refusal(**rest).param == param


def test_schemas_are_bounded_in_depth_and_size() -> None:
    for schema in (deep(100), {"description": "x" * 300_000}):
        wrong = refusal(tools=[function("a", parameters=schema)])
        assert wrong.param == "tools[0].function.parameters"
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        assert refusal(response_format=form).param == "response_format.json_schema.schema"


def test_fields_find_their_place_in_the_request() -> None:
    request = ask(
        {"role": "system", "content": "s"}, user(),
        {"role": "assistant", "content": "go on"},
        temperature=0, top_p=0.5, top_k=-1, min_p=0.1, seed=-5, stop=["a", "a"], max_tokens=9,
        frequency_penalty=1, presence_penalty=-1, repetition_penalty=1.1, logit_bias={"5": -100},
        logprobs=True, top_logprobs=3, n=2, min_tokens=2, ignore_eos=True, stop_token_ids=[7],
        parallel_tool_calls=False, reasoning={"effort": "high"}, verbosity="low",
        chat_template_kwargs={"enable_thinking": False}, continue_final_message=True,
        add_generation_prompt=False, model="m",
    )  # fmt: skip
    s = request.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p, s.seed, s.stop) == (
        0,
        0.5,
        0,
        0.1,
        -5,
        ("a",),
    )
    assert (s.max_tokens, s.min_tokens, s.ignore_eos, s.stop_token_ids) == (9, 2, True, (7,))
    assert (s.frequency_penalty, s.presence_penalty, s.repetition_penalty) == (1, -1, 1.1)
    assert (s.logit_bias, s.logprobs, s.n) == (((5, -100),), 3, 2)
    assert request.reasoning_effort == "high" and not request.parallel_tool_calls
    assert request.template_options == {"enable_thinking": False}
    assert request.continue_final_message
    assert [m.role for m in request.messages] == ["system", "developer", "user", "assistant"]


def test_half_a_character_in_a_body_becomes_the_replacement_character() -> None:
    body = parse(b'{"messages": [{"role": "user", "content": "a\\ud83d b\\ud83d\\ude00"}]}')
    assert chat.read(body).request.messages[0].text == "a\ufffd b😀"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
NAMES = st.sampled_from(["messages", "tools", "tool_choice", "stop", "logit_bias", "n", "stream",
                         "response_format", "reasoning", "metadata", "stream_options", "input",
                         "prompt", "text", "include", "role", "content", "type"])  # fmt: skip
ITEM = st.dictionaries(
    st.sampled_from(["role", "content", "type", "tool_calls", "function", "name", "text",
                     "image_url", "call_id", "output", "arguments", "tool_call_id"]),
    JSON | st.sampled_from(["user", "assistant", "tool", "message", "function", "text",
                            "function_call", "reasoning", "namespace", "custom"]),
)  # fmt: skip


@given(st.dictionaries(NAMES, JSON | ITEM | st.lists(ITEM, max_size=3)))
@settings(max_examples=80, deadline=None)
def test_no_body_whatever_it_holds_gives_anything_but_a_request_or_a_400(body: Any) -> None:
    for reader in (
        chat.read,
        completions.read,
        lambda b: responses.read(b, lambda _: None),
        lambda b: responses.read_as_chat(b, lambda _: None),
    ):
        try:
            reader(Body(body))
        except InvalidRequest as wrong:
            assert wrong.message


# ---- answers ------------------------------------------------------------------------------------

HEAD = Head("chatcmpl-1", "m", "fp_1", 1)
SCORE = TokenLogprob("x", b"x", -0.5, (TokenLogprob("y", b"\xff", -1.0),))


@st.composite
def choices(draw: st.DrawFn, index: int) -> list[Event]:
    """One choice's events as a parser may give them."""
    events: list[Event] = []
    calls = 0
    for kind in draw(st.lists(st.sampled_from("rtc"), max_size=5)):
        texts = draw(st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=4))
        if kind == "r":
            events += [ReasoningDelta(text, index) for text in texts]
        elif kind == "t":
            scores = (SCORE,) if draw(st.booleans()) else ()
            events += [TextDelta(text, index, scores) for text in texts]
        else:
            events.append(ToolCallStarted(calls, f"call_{index}_{calls}", "f", index))
            events += [ToolCallDelta(calls, text, index) for text in texts]
            calls += 1
    reason = draw(st.sampled_from(["stop", "length", "tool_calls"]))
    return [*events, ChoiceFinished(reason, index)]


@st.composite
def answers(draw: st.DrawFn) -> tuple[int, list[Event]]:
    """n choices' events, interleaved, with the frame that the service gives them."""
    n = draw(st.integers(1, 3))
    waiting = [draw(choices(i)) for i in range(n)]
    events: list[Event] = []
    while any(waiting):
        i = draw(st.sampled_from([i for i, queue in enumerate(waiting) if queue]))
        events.append(waiting[i].pop(0))
    return n, [Accepted(3), *events, Finished(Usage(3, 9, 1, 4), Timing(0.1, 0.2))]


def chunks_of(text: str) -> list[dict[str, Any]]:
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


@given(answers(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_stream_put_together_by_the_sdk_equals_the_whole_answer(
    answer: tuple[int, list[Event]], is_joined: bool
) -> None:
    n, events = answer
    fold, writer = Fold(HEAD, n), ChunkWriter(HEAD, n, include_usage=True)
    for event in events:
        fold.event(event)
    written = "".join(writer.event(event) for event in (joined(events) if is_joined else events))
    state = ChatCompletionStreamState()
    thoughts = [""] * n
    for chunk in chunks_of(written):
        for choice in chunk["choices"]:
            thoughts[choice["index"]] += choice["delta"].get("reasoning", "")
        parsed = ChatCompletionChunk.model_validate(chunk)
        state.handle_chunk(parsed)
    streamed = state.current_completion_snapshot.model_dump()
    whole = fold.body()
    assert streamed["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    for a, b in zip(streamed["choices"], whole["choices"], strict=True):
        assert (a["message"]["content"] or "") == (b["message"]["content"] or "")
        assert thoughts[a["index"]] == b["message"].get("reasoning", "")
        assert a["finish_reason"] == b["finish_reason"]
        calls = [
            {"id": c["id"], "type": c["type"], "function":
             {"name": c["function"]["name"], "arguments": c["function"]["arguments"]}}
            for c in a["message"]["tool_calls"] or []
        ]  # fmt: skip
        assert calls == b["message"].get("tool_calls", [])
        scores = (a["logprobs"] or {}).get("content") or []
        assert len(scores) == len((b["logprobs"] or {}).get("content") or [])


@given(st.lists(answers(), min_size=1, max_size=1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_streamed_responses_last_event_holds_what_its_deltas_said(
    drawn: list[tuple[int, list[Event]]], is_joined: bool
) -> None:
    _, events = drawn[0]
    events = [event for event in events if getattr(event, "choice", 0) == 0]
    request = responses.read(Body({"input": "hi"}), lambda _: None)
    builder = ResponseBuilder(HEAD, request.echo, request.declared)
    whole = ResponseBuilder(HEAD, request.echo, request.declared)
    for event in events:
        whole.event(event)
    frames = "".join(builder.event(event) for event in (joined(events) if is_joined else events))
    told = [json.loads(line[6:]) for line in frames.split("\n") if line.startswith("data: ")]
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    final = told[-1]["response"]
    assert final["output"] == whole.body()["output"]
    grown: dict[str, str] = {}
    for event in told:
        if event["type"].endswith(".delta"):
            grown[event["item_id"]] = grown.get(event["item_id"], "") + event["delta"]
    said = {item["id"]: item.get("arguments") or "".join(
        part["text"] for part in item.get("content", [])) for item in final["output"]}  # fmt: skip
    assert grown == {name: text for name, text in said.items() if text}
    added = [e["item"]["id"] for e in told if e["type"] == "response.output_item.added"]
    done = [e["item"]["id"] for e in told if e["type"] == "response.output_item.done"]
    assert sorted(added) == sorted(done) == sorted(said)


@given(st.text())
def test_encoded_json_is_one_line_to_any_splitter_and_the_same_text(text: str) -> None:
    written = encode(text)
    assert len(written.splitlines()) == 1
    assert json.loads(written) == text
