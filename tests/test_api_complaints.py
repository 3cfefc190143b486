"""Twenty-eight things that hurt users of other local servers, each held here over real HTTP.

The engine is scripted; format, vocabulary, service and wire are the real ones for gpt-oss.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import httpx
import pytest

from serve.engine.face import Waiting
from serve.engine.scripted import HANG, ScriptedEngine
from serve.errors import OutOfMemory
from serve.formats.harmony import HarmonyFormat
from serve.formats.harmony_render import marks_of
from serve.formats.vocabulary import Vocabulary
from serve.service import ServedModel, Service
from serve.values import ModelCard
from serve.wire import sse
from tests.o200k import SPECIAL, harmony_tokenizer
from tests.serving import OWNER, Served, serving, settings_in

CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}]  # fmt: skip
ANALYSIS = "<|channel|>analysis<|message|>"
NEXT = "<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
CALL = "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
LEAKS = [*SPECIAL, "<|", "|>", "analysis", "commentary", "assistantfinal", "to=functions"]


@cache
def harmony() -> HarmonyFormat:
    words = Vocabulary(harmony_tokenizer(), 201088)
    marks = marks_of(words)
    assert marks is not None
    return HarmonyFormat(words, marks)


def ids(text: str) -> list[int]:
    return list(harmony_tokenizer().encode(text, add_special_tokens=False))


def text_of(tokens: Sequence[int]) -> str:
    return str(harmony_tokenizer().decode(list(tokens)))


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine(eos_ids=ids("<|return|><|endoftext|>"), context_length=100_000)


@pytest.fixture(scope="module")
def served(engine: ScriptedEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    service = Service("openai/gpt-oss-20b")
    card = ModelCard("openai/gpt-oss-20b", engine.context_length, harmony().capabilities())
    service.attach(ServedModel(card, harmony(), engine))
    with serving(service, settings_in(tmp_path_factory.mktemp("api"))) as served:
        yield served


class Api:
    """Asks with the model saying what a test wants, whole and streamed."""

    def __init__(self, client: httpx.Client, engine: ScriptedEngine) -> None:
        self.client = client
        self.engine = engine

    def says(self, text: str, *more: Any) -> None:
        self.engine.script = [*ids(text), *more]

    def post(self, body: dict[str, Any], path: str = CHAT) -> httpx.Response:
        first = {} if "messages" in body or "input" in body or path != CHAT else {"messages": USER}
        return self.client.post(path, json={**first, **body})

    def whole(self, **body: Any) -> dict[str, Any]:
        answer = self.post(body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def choice(self, **body: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.whole(**body)["choices"][0]
        return found

    def chunks(self, **body: Any) -> list[dict[str, Any]]:
        answer = self.post({"stream": True, **body})
        assert answer.status_code == 200, answer.text
        lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    def streamed(self, **body: Any) -> dict[str, Any]:
        """One choice put together from its chunks."""
        found: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "reason": None}
        for chunk in self.chunks(**body):
            for choice in chunk["choices"]:
                delta = choice["delta"]
                found["content"] += delta.get("content") or ""
                found["reasoning"] += delta.get("reasoning") or ""
                for call in delta.get("tool_calls", ()):
                    kept = found["calls"].setdefault(call["index"], ["", ""])
                    kept[0] += call["function"].get("name", "")
                    kept[1] += call["function"].get("arguments", "")
                found["reason"] = choice["finish_reason"] or found["reason"]
        return found

    @property
    def prompt(self) -> str:
        return text_of(self.engine.submitted[-1].prompt.ids)


@pytest.fixture
def api(served: Served, engine: ScriptedEngine) -> Iterator[Api]:
    with served.client() as client:
        yield Api(client, engine)
    assert engine.wait_until_idle(5)


def calls_of(choice: dict[str, Any]) -> list[tuple[str, str]]:
    found = choice["message"].get("tool_calls", [])
    return [(call["function"]["name"], call["function"]["arguments"]) for call in found]


def assert_clean(text: str) -> None:
    assert not [leak for leak in LEAKS if leak in text], text


def test_01_no_harmony_markup_in_any_field(api: Api) -> None:
    api.says(f"{ANALYSIS}They greet.{NEXT}<|channel|>commentary<|message|>One moment."
             f"{NEXT}{FINAL}Hello.<|return|>")  # fmt: skip
    message = api.choice(tools=TOOLS)["message"]
    assert message["reasoning"] == "They greet."
    assert message["content"].endswith("Hello.") and "One moment." in message["content"]
    streamed = api.streamed(tools=TOOLS)
    assert (streamed["content"], streamed["reasoning"]) == (message["content"], "They greet.")
    assert_clean(json.dumps(message) + streamed["content"])


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.get_weather<|channel|>commentary<|message|>",
        " to=functions.get_weather<|channel|>commentary json<|message|>",
        "<|channel|>commentary to=functions.get_weather<|constrain|>json<|message|>",
        "<|channel|>analysis to=functions.get_weather code<|message|>",
    ],
)
def test_02_tool_names_are_cut_clean_of_control_tokens(api: Api, header: str) -> None:
    api.says(f"{header}{{}}<|call|>")
    assert calls_of(api.choice(tools=TOOLS)) == [("get_weather", "{}")]


@pytest.mark.parametrize(
    "odd",
    [
        "<|channel|><|channel|><|message|>x",
        "<|start|><|start|>assistant<|end|><|end|>",
        "just text without any header",
        f"{ANALYSIS}thinking{FINAL}and then<|message|>more",
        "<|constrain|><|call|>",
        "",
    ],
)
def test_03_odd_output_is_never_a_500_or_a_dead_stream(api: Api, odd: str) -> None:
    api.says(odd)
    message = api.choice(tools=TOOLS)["message"]
    streamed = api.streamed(tools=TOOLS)
    assert streamed["content"] == (message["content"] or "")
    assert_clean(streamed["content"].replace("analysis", ""))


def test_04_arguments_that_are_no_json_are_passed_on_as_they_are_with_200(api: Api) -> None:
    broken = '{"city": "Par\nis", oops}'
    api.says(f"{CALL}{broken}<|call|>")
    assert calls_of(api.choice(tools=TOOLS)) == [("get_weather", broken)]
    assert api.streamed(tools=TOOLS)["calls"] == {0: ["get_weather", broken]}


def test_05_broken_arguments_in_history_do_not_fail_later_turns(api: Api) -> None:
    api.says(f"{FINAL}Fine.<|return|>")
    call = {"id": "c1", "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Par'}}  # fmt: skip
    history = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]},
               {"role": "tool", "tool_call_id": "c1", "content": "sunny"}]  # fmt: skip
    assert api.choice(messages=history, tools=TOOLS)["message"]["content"] == "Fine."
    assert '{"city": "Par' in api.prompt
    nameless = [*USER, {"role": "tool", "tool_call_id": "unknown", "content": "?"}]
    assert api.post({"messages": nameless}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_06_thoughts_between_tool_calls_are_kept_for_clients_that_drop_them(
    api: Api, stream: bool
) -> None:
    thought = f"The weather in Paris decides it, streamed {stream}."
    api.says(f"{ANALYSIS}{thought}{NEXT}{CALL}{{}}<|call|>")
    if stream:
        opening = [c["choices"][0]["delta"].get("tool_calls") for c in api.chunks(tools=TOOLS)]
        call_id = next(calls[0]["id"] for calls in opening if calls)
    else:
        call_id = api.choice(tools=TOOLS)["message"]["tool_calls"][0]["id"]
    call = {"id": call_id, "type": "function",
            "function": {"name": "get_weather", "arguments": "{}"}}  # fmt: skip
    api.says(f"{FINAL}Sunny.<|return|>")
    api.choice(tools=TOOLS, messages=[
        *USER, {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": "sunny"}])  # fmt: skip
    assert thought in api.prompt
    api.choice(tools=TOOLS, messages=[
        *USER, {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call_id, "content": "sunny"},
        {"role": "assistant", "content": "Sunny."}, *USER])  # fmt: skip
    assert thought not in api.prompt, "dropped after the final answer, as the model's template does"


def test_07_tool_choice_is_enforced(api: Api) -> None:
    api.says(f"{FINAL}Hello.<|return|>")
    api.choice(tools=TOOLS, tool_choice="none")
    assert "get_weather" not in api.prompt
    assert api.engine.submitted[-1].grammar is None
    for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
        api.choice(tools=TOOLS, tool_choice=choice)
        grammar = api.engine.submitted[-1].grammar
        assert grammar is not None
        assert_refuses(grammar, FINAL)
        assert_takes(grammar, f'{ANALYSIS}free <thought>{NEXT}{CALL}{{"city": "x"}}')


def test_08_response_format_binds_the_final_content_only_and_is_shown_to_the_model(
    api: Api,
) -> None:
    api.says(f'{FINAL}{{"city": "Paris"}}<|return|>')
    schema = {"type": "object", "properties": {"city": {"type": "string"}},
              "required": ["city"], "additionalProperties": False}  # fmt: skip
    form = {"type": "json_schema",
            "json_schema": {"name": "place", "schema": schema, "strict": True}}  # fmt: skip
    assert json.loads(api.choice(response_format=form)["message"]["content"]) == {"city": "Paris"}
    assert "# Response Formats" in api.prompt and "place" in api.prompt
    grammar = api.engine.submitted[-1].grammar
    assert grammar is not None
    assert_takes(grammar, f'{ANALYSIS}no { {} } JSON here{NEXT}{FINAL}{{"city": "Paris"}}')
    assert_refuses(grammar, f"{FINAL}Paris")


def matched(grammar: Any, text: str) -> int:
    """How many ids of `text` the grammar lets through, one after another."""
    import numpy as np

    matcher = grammar.matcher()
    for done, token in enumerate(ids(text)):
        mask = np.zeros((1, (201088 + 31) // 32), dtype=np.int32)
        if matcher.fill(mask, 0) and not (int(mask[0, token // 32]) >> (token % 32)) & 1:
            return done
        matcher.accept(token)
    return len(ids(text))


def assert_takes(grammar: Any, text: str) -> None:
    assert matched(grammar, text) == len(ids(text)), text_of(ids(text)[: matched(grammar, text)])


def assert_refuses(grammar: Any, text: str) -> None:
    assert matched(grammar, text) < len(ids(text))


@pytest.mark.parametrize(
    ("effort", "told"),
    [("none", "low"), ("minimal", "low"), ("low", "low"), ("medium", "medium"), ("high", "high"),
     ("xhigh", "high"), ("max", "high")],
)  # fmt: skip
def test_09_every_effort_is_accepted_in_every_place_and_mapped(
    api: Api, effort: str, told: str
) -> None:
    api.says(f"{FINAL}ok<|return|>")
    for body in ({"reasoning_effort": effort}, {"reasoning": {"effort": effort}},
                 {"chat_template_kwargs": {"reasoning_effort": effort}}):  # fmt: skip
        api.choice(**body)
        assert f"Reasoning: {told}" in api.prompt
    answer = api.post({"input": "hi", "reasoning": {"effort": effort}}, "/v1/responses")
    assert answer.json()["reasoning"]["effort"] == effort
    assert f"Reasoning: {told}" in api.prompt


def test_10_reasoning_is_written_and_read_under_both_names(api: Api) -> None:
    api.says(f"{ANALYSIS}hm{NEXT}{FINAL}ok<|return|>")
    message = api.choice()["message"]
    assert message["reasoning"] == message["reasoning_content"] == "hm"
    deltas = [chunk["choices"][0]["delta"] for chunk in api.chunks()]
    assert all(d.get("reasoning") == d.get("reasoning_content") for d in deltas)
    for name in ("reasoning", "reasoning_content", "thinking"):
        call = {"id": "z", "type": "function",
                "function": {"name": "get_weather", "arguments": "{}"}}  # fmt: skip
        api.choice(tools=TOOLS, messages=[
            *USER, {"role": "assistant", name: f"secret {name}", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "z", "content": "x"}])  # fmt: skip
        assert f"secret {name}" in api.prompt


def test_11_tokens_spent_on_thinking_alone_end_as_length_with_the_thoughts(api: Api) -> None:
    api.says(f"{ANALYSIS}I think and think and think and")
    limit = len(ids(f"{ANALYSIS}I think and"))
    answer = api.whole(max_completion_tokens=limit)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"] == ""
    assert choice["message"]["reasoning"] == "I think and"
    details = answer["usage"]["completion_tokens_details"]
    assert 3 <= details["reasoning_tokens"] <= answer["usage"]["completion_tokens"] == limit


@pytest.mark.parametrize(
    ("said", "limit", "reason"),
    [
        (f"{FINAL}Hello.<|return|>", None, "stop"),
        (f"{CALL}{{}}<|call|>", None, "tool_calls"),
        (f"{CALL}{{}}", 8, "length"),
        (f"{FINAL}Hello there, you.", 6, "length"),
    ],
)
def test_12_the_finish_reason_is_the_same_streamed_and_whole_and_length_wins(
    api: Api, said: str, limit: int | None, reason: str
) -> None:
    api.says(said)
    limits = {} if limit is None else {"max_tokens": limit}
    assert api.choice(tools=TOOLS, **limits)["finish_reason"] == reason
    assert api.streamed(tools=TOOLS, **limits)["reason"] == reason


def test_13_tool_call_deltas_name_id_and_type_once_with_dense_indices(api: Api) -> None:
    api.says(f'{CALL}{{"city": "Paris"}}{NEXT}{CALL}{{"city": "Rome"}}<|call|>')
    deltas = [c["choices"][0]["delta"] for c in api.chunks(tools=TOOLS)]
    fragments = [call for delta in deltas for call in delta.get("tool_calls", ())]
    openings = [call for call in fragments if "id" in call]
    assert [call["index"] for call in openings] == [0, 1]
    assert all(call["type"] == "function" and call["function"]["name"] for call in openings)
    assert len({call["id"] for call in openings}) == 2
    rest = [call for call in fragments if "id" not in call]
    assert all(set(call) == {"index", "function"} for call in rest)
    assert all(set(call["function"]) == {"arguments"} for call in rest)
    assert not any(delta.get("content") for delta in deltas)


def test_14_exactly_one_usage_chunk_and_only_when_asked(api: Api) -> None:
    api.says(f"{FINAL}ok<|return|>")
    assert not [chunk for chunk in api.chunks() if "usage" in chunk]
    chunks = api.chunks(stream_options={"include_usage": True})
    assert [bool(chunk["usage"]) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["choices"] == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("is_queued", [False, True])
def test_15_a_client_that_goes_away_stops_the_work_queued_or_running(
    api: Api, stream: bool, is_queued: bool
) -> None:
    begun = [Waiting(3)] if is_queued else ids(f"{FINAL}on and on")
    api.engine.script = [*begun, HANG]
    with pytest.raises(httpx.ReadTimeout):
        api.client.post(CHAT, json={"messages": USER, "stream": stream}, timeout=0.6)
    assert api.engine.wait_until_idle(3)


def test_16_a_stream_sends_headers_at_once_and_pings_by_default(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sse.PING_SECONDS <= 15
    monkeypatch.setattr(sse, "PING_SECONDS", 0.2)
    api.engine.script = [Waiting(3), 0.7, *ids(f"{FINAL}ok<|return|>")]
    began = time.monotonic()
    body = {"messages": USER, "stream": True}
    with api.client.stream("POST", CHAT, json=body) as answer:
        assert answer.status_code == 200 and time.monotonic() - began < 0.6
        assert answer.headers["x-accel-buffering"] == "no"
        text = "".join(answer.iter_text())
    assert ": ping" in text


def test_17_characters_split_over_tokens_arrive_whole(api: Api) -> None:
    said = "naïve 👩‍👩‍👧‍👦 漢字 ᚠᛇᚻ ok"
    api.says(f"{FINAL}{said}<|return|>")
    assert len(ids(said)) > 12
    assert api.choice()["message"]["content"] == said
    for chunk in api.chunks():
        assert "\ufffd" not in (chunk["choices"][0]["delta"].get("content") or "")
    assert api.streamed()["content"] == said


def test_18_stop_strings_are_never_part_of_the_answer_and_not_seen_in_reasoning(api: Api) -> None:
    api.says(f"{ANALYSIS}STOP is in here{NEXT}{FINAL}one ST two STOP three<|return|>")
    choice = api.choice(stop=["STOP"])
    assert choice["message"]["content"] == "one ST two "
    assert choice["message"]["reasoning"] == "STOP is in here"
    assert choice["finish_reason"] == "stop"
    assert api.streamed(stop="STOP")["content"] == "one ST two "


CODEX = {
    "model": "gpt-oss:20b",
    "stream": True,
    "input": [
        {"type": "message", "role": "developer", "id": "m1",
         "content": [{"type": "input_text", "text": "You are Codex."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "ls"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None,
         "content": [{"type": "reasoning_text", "text": "I list files."}]},
        {"type": "function_call", "id": "fc_1", "status": "completed", "call_id": "call_1",
         "name": "exec_command", "arguments": '{"cmd": "ls"}'},
        {"type": "function_call_output", "call_id": "call_1",
         "output": [{"type": "input_text", "text": "README.md"}]},
    ],
    "tools": [
        {"type": "function", "name": "exec_command", "strict": False,
         "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}}},
        {"type": "namespace", "name": "multi_agent_v1", "description": "d", "tools": [
            {"type": "function", "name": "spawn_agent", "strict": False,
             "parameters": {"type": "object", "properties": {}}}]},
        {"type": "web_search"},
        {"type": "local_shell"},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"summary": "auto"},
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "k",
    "client_metadata": {"x-codex-installation-id": "1"},
}  # fmt: skip


def events_of(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    lines = [line[6:] for line in answer.text.split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines]


def test_19_codexs_tools_history_and_fields_are_understood(api: Api) -> None:
    api.says(
        "<|channel|>commentary to=functions.spawn_agent <|constrain|>json<|message|>{}<|call|>"
    )
    answer = api.post(CODEX, "/v1/responses")
    done = [e["item"] for e in events_of(answer) if e["type"] == "response.output_item.done"]
    assert [(item["name"], item.get("namespace")) for item in done] == [
        ("spawn_agent", "multi_agent_v1")
    ]
    assert "I list files." in api.prompt and "README.md" in api.prompt
    assert "web_search" in answer.headers["x-ignored-fields"]


def test_20_cursors_responses_shaped_body_on_the_chat_route_gets_chat_chunks(api: Api) -> None:
    api.says(f"{CALL}{{}}<|call|>")
    body = {
        "model": "gpt-oss:20b",
        "input": [
            {"role": "system", "content": "You are an agent."},
            {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        ],
        "tools": [
            {"type": "function", "name": "get_weather", "parameters": {"type": "object"}},
            {"type": "custom", "name": "ApplyPatch", "format": {
                "type": "grammar", "syntax": "lark", "definition": "start: /.+/"}},
            *[{"type": "function", "function": {"name": "other"}}],
        ],
        "reasoning": {"effort": "high"},
        "stream": True,
        "stream_options": {"include_usage": True},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "user": "u",
    }  # fmt: skip
    chunks = api.chunks(**body)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert "ApplyPatch" in api.prompt and "Reasoning: high" in api.prompt


def test_21_system_turns_anywhere_and_thinking_blocks_are_tolerated(api: Api) -> None:
    api.says(f"{FINAL}ok<|return|>")
    blocks = [
        {"type": "thinking", "thinking": "t", "signature": "s"},
        {"type": "text", "text": "a"},
    ]
    assert api.choice(messages=[*USER, {"role": "assistant", "content": blocks},
                                {"role": "system", "content": "be brief"}, *USER])  # fmt: skip
    missing = api.post({}, "/v1/messages")
    assert missing.status_code == 404 and CHAT in missing.json()["error"]["message"]


def test_22_responses_events_come_in_full_and_in_order(api: Api) -> None:
    api.says(f"{ANALYSIS}hm hm{NEXT}{FINAL}Hello there{NEXT}{CALL}{{}}<|call|>")
    flat = [{"type": "function", **TOOLS[0]["function"]}]  # type: ignore[dict-item]
    events = events_of(api.post({"input": "hi", "stream": True, "tools": flat}, "/v1/responses"))
    names = [e["type"].removeprefix("response.") for e in events]
    order = list(dict.fromkeys(f"{e.get('output_index', '')}{n}" for e, n in
                               zip(events, names, strict=True)))  # fmt: skip
    assert order == [
        "created", "in_progress",
        "0output_item.added", "0content_part.added", "0reasoning_text.delta",
        "0reasoning_text.done", "0content_part.done", "0output_item.done",
        "1output_item.added", "1content_part.added", "1output_text.delta",
        "1output_text.done", "1content_part.done", "1output_item.done",
        "2output_item.added", "2function_call_arguments.delta",
        "2function_call_arguments.done", "2output_item.done",
        "completed",
    ]  # fmt: skip
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert {e["content_index"] for e in events if "content_index" in e} == {0}


def test_23_nothing_is_fetched_to_speak_harmony() -> None:
    import subprocess

    script = (
        "import socket, sys\n"
        "def refuse(*_, **__): raise OSError('no network in this test')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from tests.test_api_complaints import harmony\n"
        "from serve.values import ChatRequest, Message, TextPart\n"
        "assert harmony().render(ChatRequest([Message('user', (TextPart('hi'),))])).prompt.ids\n"
        "assert 'openai_harmony' not in sys.modules\n"
    )
    harmony_tokenizer()  # its file is on disk from here on
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_24_a_prompt_that_is_too_long_is_400_before_any_work_and_oom_hurts_only_its_request(
    api: Api,
) -> None:
    before = len(api.engine.submitted)
    answer = api.post({"messages": [{"role": "user", "content": "word " * 100_001}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert len(api.engine.submitted) == before
    api.engine.script = [OutOfMemory("This request did not fit beside the others.")]
    failed = api.post({})
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "out_of_memory")
    api.says(f"{FINAL}ok<|return|>")
    assert api.choice()["message"]["content"] == "ok"


@pytest.mark.parametrize(
    "body",
    [
        {"modalities": ["audio"]},
        {"web_search_options": {}},
        {"functions": [{"name": "f"}]},
        {"store": True},
        {"guided_json": {}},
        {"typical_p": 0.5},
        {"temprature": 0},
        {"response_format": {"type": "regex"}},
        {"chat_template": "x"},
    ],
)
def test_25_what_would_change_the_answer_and_is_not_done_is_a_400_naming_it(
    api: Api, body: dict[str, Any]
) -> None:
    answer = api.post(body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(next(iter(body)))


def test_26_logprobs_are_of_content_tokens_with_bytes_and_an_empty_top_list_unasked(
    api: Api,
) -> None:
    api.says(f"{ANALYSIS}hm{NEXT}{FINAL}Hello 👩‍👩‍👧<|return|>")
    scores = api.choice(logprobs=True)["logprobs"]["content"]
    assert b"".join(bytes(score["bytes"]) for score in scores).decode() == "Hello 👩‍👩‍👧"
    assert all(score["top_logprobs"] == [] and score["logprob"] <= 0 for score in scores)
    asked = api.choice(logprobs=True, top_logprobs=2)["logprobs"]["content"]
    assert all(len(score["top_logprobs"]) == 2 for score in asked)
    streamed = [s for c in api.chunks(logprobs=True)
                for s in ((c["choices"][0]["logprobs"] or {}).get("content") or [])]  # fmt: skip
    assert streamed == scores


def test_27_our_routes_need_our_key_in_either_header_whatever_the_page_does(
    served: Served,
) -> None:
    with served.client(key=None) as client:
        assert client.get("/v1/models").status_code == 401
        both = {"authorization": "Bearer hf_platform_token", "x-api-key": OWNER}
        assert client.get("/v1/models", headers=both).status_code == 200


def test_28_a_call_to_an_undeclared_tool_does_not_vanish(api: Api) -> None:
    api.says('<|channel|>commentary to=functions.launch_rocket <|constrain|>json<|message|>'
             '{"now": true}<|call|>')  # fmt: skip
    choice = api.choice(tools=TOOLS)
    assert '{"now": true}' in json.dumps([choice["message"]["content"], calls_of(choice)]).replace(
        '\\"', '"'
    )
    assert '{"now": true}' in (api.choice()["message"]["content"] or "")


def test_sixty_clients_that_leave_at_random_moments_leave_nothing_behind(
    served: Served, engine: ScriptedEngine
) -> None:
    engine.script = [*ids(f"{FINAL}on"), 0.3, *ids(" and on<|return|>")]

    def leave(after: float) -> None:
        with served.client() as client:
            try:
                client.post(CHAT, json={"messages": USER, "stream": after > 0.2}, timeout=after)
            except httpx.TransportError:
                pass

    clients = [threading.Thread(target=leave, args=(0.02 + i * 0.008,)) for i in range(60)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert engine.wait_until_idle(5)
