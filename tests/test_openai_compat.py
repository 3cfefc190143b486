"""The routes over real HTTP: keys, errors, streams, disconnects, and a client's view of it all."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from openai_compat import create_api
from serve.engine.scripted import HANG, Say, ScriptedEngine
from serve.errors import EngineFailed, Overloaded
from serve.keys import KeyRing
from serve.service import Service
from serve.settings import Settings
from serve.values import PassedOver, Progress
from serve.wire import sse
from tests.fakes import CALL, END, SAY, THINK, ids, service_with
from tests.serving import OWNER, Served, serving, settings_in

HELLO = [THINK, Say(ids("hm")), SAY, Say(ids("Hel")), Say(ids("lo")), END]
ASK = {"model": "default", "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"

Start = Callable[..., Served]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(script or engine or service, **settings) -> a running API."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def begin(script: Any = HELLO, **changes: object) -> Served:
            if isinstance(script, Service):
                service = script
            else:
                engine = (
                    script
                    if isinstance(script, ScriptedEngine)
                    else ScriptedEngine(script, eos_ids={END})
                )
                service = service_with(engine)
            return stack.enter_context(serving(service, settings_in(tmp_path, **changes)))

        yield begin


def frames(text: str) -> list[Any]:
    found = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in found]


def test_a_whole_answer_has_text_reasoning_usage_and_the_real_models_name(start: Start) -> None:
    with start().client() as client:
        answer = client.post(CHAT, json=ASK)
    assert answer.status_code == 200
    body = answer.json()
    message = body["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == ("Hello", "hm")
    assert message["reasoning_content"] == "hm"
    assert body["model"] == "tiny/model"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_stream_says_the_role_once_and_ends_with_one_finish_chunk_and_done(start: Start) -> None:
    with start().client() as client:
        answer = client.post(CHAT, json={**ASK, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    chunks = frames(answer.text)
    assert chunks[-1] == "[DONE]"
    deltas = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert [d["delta"].get("role") for d in deltas].count("assistant") == 1
    assert deltas[0]["delta"]["role"] == "assistant"
    assert "".join(d["delta"].get("content", "") for d in deltas) == "Hello"
    assert [d["finish_reason"] for d in deltas].count("stop") == 1
    assert deltas[-1]["finish_reason"] == "stop"
    assert all("usage" not in chunk for chunk in chunks[:-1])


def test_the_usage_chunk_comes_when_asked_with_no_choices_right_before_done(start: Start) -> None:
    asked = {**ASK, "stream": True, "stream_options": {"include_usage": True}}
    with start().client() as client:
        chunks = frames(client.post(CHAT, json=asked).text)
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"]["total_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in chunks[:-2])


def test_tool_calls_stream_their_id_and_name_once(start: Start) -> None:
    script = [CALL, Say(ids('look({"a":')), Say(ids("1}")), END]
    tools = [{"type": "function", "function": {"name": "look"}}]
    with start(script).client() as client:
        chunks = frames(client.post(CHAT, json={**ASK, "stream": True, "tools": tools}).text)
    calls = [c["choices"][0]["delta"].get("tool_calls") for c in chunks[:-1]]
    found = [call[0] for call in calls if call]
    assert found[0]["function"] == {"name": "look", "arguments": ""} and found[0]["id"]
    assert all(set(call) == {"index", "function"} for call in found[1:])
    assert "".join(c["function"]["arguments"] for c in found) == '{"a":1}'
    assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("stream", [False, True])
def test_an_early_failure_is_a_real_status_streamed_or_not(start: Start, stream: bool) -> None:
    engine = ScriptedEngine(refusal=Overloaded("Full. Try again in 3 s.", retry_after=2.2))
    with start(engine).client() as client:
        answer = client.post(CHAT, json={**ASK, "stream": stream})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.json()["error"]["code"] == "overloaded"


def test_a_late_failure_is_an_error_frame_then_done_or_a_status(start: Start) -> None:
    served = start([Say(ids("ab")), EngineFailed("The step failed.")])
    with served.client() as client:
        chunks = frames(client.post(CHAT, json={**ASK, "stream": True}).text)
        whole = client.post(CHAT, json=ASK)
    assert chunks[-2]["error"]["code"] == "engine_error" and chunks[-1] == "[DONE]"
    assert whole.status_code == 500 and whole.headers["x-should-retry"] == "false"


def test_while_the_model_loads_chat_is_503_with_retry_after_and_ready_says_why(
    start: Start,
) -> None:
    service = Service("openai/gpt-oss-20b")
    service.report(Progress("downloading", seconds_left=42))
    service.pass_over(PassedOver("openai/gpt-oss-20b", "needs 14 GB", "a larger machine"))
    with start(service).client() as client:
        answer = client.post(CHAT, json=ASK)
        ready = client.get("/ready")
        health = client.get("/health")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "model_loading"
    assert answer.headers["retry-after"] == "42"
    assert ready.status_code == 503
    assert ready.json()["passed_over"][0]["reason"] == "needs 14 GB"
    assert health.status_code == 200


@pytest.mark.parametrize("name", ["tiny/model", "default", "gpt-oss:20b"])
def test_the_models_names(start: Start, name: str) -> None:
    with start().client() as client:
        assert client.post(CHAT, json={**ASK, "model": name}).json()["model"] == "tiny/model"
        assert client.get(f"/v1/models/{name}").json()["id"] == "tiny/model"


def test_an_unknown_model_is_404_and_lists_what_there_is(start: Start) -> None:
    with start().client() as client:
        for answer in (
            client.post(CHAT, json={**ASK, "model": "gpt-5"}),
            client.get("/v1/models/gpt-5"),
        ):
            assert answer.status_code == 404
            assert answer.json()["error"]["code"] == "model_not_found"
            assert "tiny/model" in answer.json()["error"]["message"]


def test_errors_under_v1_are_always_the_envelope(start: Start) -> None:
    with start().client() as client:
        answers = [
            (404, client.get("/v1/nothing")),
            (404, client.post("/v1/v1/chat/completions", json=ASK)),
            (405, client.get(CHAT)),
            (405, client.post("/v1/models", json={})),
            (400, client.post(CHAT, content=b"{")),
            (400, client.post(CHAT, content=b"[1]")),
            (400, client.post(CHAT, content=b"[" * 100_000)),
            (400, client.post(CHAT, content=b'{"messages": [], "temperature": NaN}')),
            (401, client.get("/v1/models", headers={"authorization": "Bearer wrong"})),
        ]
    for status, answer in answers:
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "/v1/chat/completions" in answers[0][1].json()["error"]["message"]
    assert "POST" in answers[2][1].json()["error"]["message"]


def test_gradios_own_routes_keep_their_error_shape(start: Start) -> None:
    with start().client() as client:
        answer = client.get("/elsewhere")
    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})


def test_an_exception_of_ours_is_a_500_that_tells_nothing_but_its_id(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("/secret/path 0xdeadbeef")

    monkeypatch.setattr("openai_compat.about.models_json", explode)
    with start().client() as client:
        answer = client.get("/v1/models")
    assert answer.status_code == 500
    told = answer.json()["error"]["message"]
    assert "secret" not in told and answer.headers["x-request-id"] in told


# ---- keys ---------------------------------------------------------------------------------------


def test_every_route_but_health_ready_and_the_pages_key_needs_a_key(
    start: Start, tmp_path: Path
) -> None:
    settings = settings_in(tmp_path)
    keys = KeyRing.from_settings(settings)
    routes = create_api(service_with(ScriptedEngine()), keys, settings)["routes"]
    assert len(routes) >= 8
    served = start()
    with served.client(key=None) as client:
        for route in routes:
            assert isinstance(route, APIRoute)
            guards = {d.call.__name__ for d in route.dependant.dependencies if d.call}
            is_open = route.path in ("/health", "/ready", "/ui/key", "/ui/model")
            assert bool(guards & {"any_key", "owner_key"}) != is_open, route.path
            path = route.path.replace("{name:path}", "x").replace("{rest:path}", "x")
            for method in route.methods:
                answer = client.request(method, path.replace("{response_id}", "x"))
                assert (answer.status_code != 401) == is_open, (method, path)


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {OWNER}"},
        {"authorization": f"bearer  {OWNER}"},
        {"x-api-key": OWNER},
        {"authorization": "Bearer hf_platform_token", "x-api-key": OWNER},
    ],
)
def test_the_key_is_read_from_either_header(start: Start, headers: dict[str, str]) -> None:
    with start().client(key=None) as client:
        assert client.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": OWNER},
        {"authorization": f"Basic {OWNER}"},
        {"authorization": f"Bearer {OWNER}x"},
        {"authorization": f"Bearer {OWNER[:-1]}"},
        {"x-api-key": "ключ".encode().decode("latin-1")},
        {"x-api-key": "sk-guest-a.b.c.d"},
        {"x-api-key": "sk-guest-"},
    ],
)
def test_anything_else_is_401(start: Start, headers: dict[str, str]) -> None:
    with start().client(key=None) as client:
        answer = client.get(
            "/v1/models", headers={k: v.encode("latin-1") for k, v in headers.items()}
        )
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert OWNER not in answer.text


def test_a_guest_key_opens_the_chat_routes_and_nothing_else(start: Start) -> None:
    served = start()
    with served.client(key=served.keys.guest_key("203.0.113.9")) as client:
        assert client.post(CHAT, json=ASK).status_code == 200
        assert client.get("/version").status_code == 403


def key_of(client: httpx.Client, **headers: str) -> Any:
    return client.get("/ui/key", headers={"sec-fetch-site": "same-origin", **headers})


def test_the_pages_key_is_for_the_page_and_never_cached(start: Start) -> None:
    served = start(app_api_key=None, key_display="auto", host="0.0.0.0")
    with served.client(key=None) as client:
        assert client.get("/ui/key").status_code == 403
        assert client.get("/ui/key", headers={"sec-fetch-site": "cross-site"}).status_code == 403
        answer = key_of(client)
        assert answer.headers["cache-control"] == "no-store"
        assert answer.json()["kind"] == "guest" and answer.json()["expires_in"] == 3600
        owner = key_of(client, **{"x-owner-token": served.keys.owner_token}).json()
        assert owner["kind"] == "owner"
        client.headers["authorization"] = f"Bearer {owner['key']}"
        assert client.get("/version").status_code == 200


def test_a_local_page_gets_the_owners_key_unless_a_foreign_name_or_a_proxy_stands_between(
    start: Start,
) -> None:
    served = start(app_api_key=None, key_display="auto", host="127.0.0.1")
    with served.client(key=None) as client:
        assert key_of(client).json()["kind"] == "owner"
        assert key_of(client, host="evil.example").json()["kind"] == "guest"
        assert key_of(client, **{"x-forwarded-for": "1.2.3.4"}).json()["kind"] == "guest"


@pytest.mark.parametrize(
    ("switch", "as_owner", "model", "status"),
    [
        ("owner", True, "other/model", 200),
        ("owner", False, "other/model", 403),
        ("all", False, "other/model", 200),
        ("off", True, "other/model", 403),
        ("owner", True, "unheard/of", 404),
        ("off", True, "", 200),
        ("owner", False, "", 403),
    ],
)
def test_the_pages_chooser_switches_for_who_may(
    start: Start, switch: str, as_owner: bool, model: str, status: int
) -> None:
    service = service_with(ScriptedEngine())
    service.offer(["tiny/model", "other/model"])
    served = start(service, model_switch=switch, host="0.0.0.0")
    own = {"x-owner-token": served.keys.owner_token} if as_owner else {}
    with served.client(key=None) as client:
        assert client.post("/ui/model", json={"model": model}, headers=own).status_code == 403
        page = {"sec-fetch-site": "same-origin", **own}
        answer = client.post("/ui/model", json={"model": model}, headers=page)
    assert answer.status_code == status, answer.text
    assert service.status().wanted == ("other/model" if status == 200 and model else "")


@pytest.mark.parametrize(
    ("display", "kind"), [("auto", "operator"), ("guest", "guest"), ("off", "off")]
)
def test_the_operators_key_is_never_shown(start: Start, display: str, kind: str) -> None:
    with start(key_display=display, host="127.0.0.1").client(key=None) as client:
        answer = key_of(client)
    assert answer.json()["kind"] == kind and OWNER not in answer.text


# ---- the edge -----------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["a b", "x/v1/models?", "a@b", "", "é", "a" * 300])
def test_a_malformed_host_is_refused(start: Start, host: str) -> None:
    served = start()
    connection = http.client.HTTPConnection(served.base.removeprefix("http://"))
    connection.putrequest("GET", "/v1/models", skip_host=True)
    connection.putheader("Host", host.encode())
    connection.putheader("X-API-Key", OWNER)
    connection.endheaders()
    assert connection.getresponse().status == 400
    connection.close()


def test_a_body_over_the_limit_is_413_declared_or_not(start: Start) -> None:
    with start().client() as client:
        declared = client.post(CHAT, content=b" " * (33 * 2**20))
        chunked = client.post(CHAT, content=(b" " * 2**20 for _ in range(33)))
    for answer in (declared, chunked):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


def test_request_ids_are_ours_and_the_clients_is_echoed_cleaned(start: Start) -> None:
    with start().client() as client:
        answer = client.get("/v1/models", headers={"x-request-id": "my id<script>" + "z" * 500})
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.headers["x-client-request-id"] == ("myidscript" + "z" * 500)[:128]


# ---- going away ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_closed_connection_stops_the_work(start: Start, stream: bool) -> None:
    engine = ScriptedEngine([Say(ids("ab")), HANG], eos_ids={END})
    with start(engine).client() as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json={**ASK, "stream": stream}, timeout=0.5)
        assert engine.wait_until_idle(3)
    assert engine.cancelled


def test_a_silent_stream_pings(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_SECONDS", 0.1)
    with start([0.35, Say(ids("x")), END]).client() as client:
        text = client.post(CHAT, json={**ASK, "stream": True}).text
    assert text.count(": ping\n\n") >= 2
    assert frames(text)[-1] == "[DONE]"


def test_when_the_server_stops_a_stream_ends_with_an_error_frame_and_done(start: Start) -> None:
    engine = ScriptedEngine([Say(ids("ab")), HANG], eos_ids={END})
    served = start(engine)
    found: list[str] = []

    def read() -> None:
        with (
            served.client() as client,
            client.stream("POST", CHAT, json={**ASK, "stream": True}) as s,
        ):
            found.extend(s.iter_text())

    reader = threading.Thread(target=read)
    reader.start()
    limit = time.monotonic() + 5
    while not found and time.monotonic() < limit:
        time.sleep(0.01)
    served.server.should_exit = True
    reader.join(8)
    chunks = frames("".join(found))
    assert chunks[-2]["error"]["code"] == "unavailable" and chunks[-1] == "[DONE]"
    assert engine.wait_until_idle(3)


def test_when_the_engine_closes_a_stream_ends_with_an_error_frame_and_done(start: Start) -> None:
    engine = ScriptedEngine([Say(ids("ab")), HANG], eos_ids={END})
    with (
        start(engine).client() as client,
        client.stream("POST", CHAT, json={**ASK, "stream": True}) as answer,
    ):
        texts = answer.iter_text()
        found = next(texts)
        closing = threading.Thread(target=engine.close)
        closing.start()
        chunks = frames(found + "".join(texts))
    closing.join()
    assert chunks[-2]["error"]["code"] == "unavailable" and chunks[-1] == "[DONE]"


def test_what_waits_together_is_one_frame_and_the_same_text(start: Start) -> None:
    script = [Say(ids("a" * 200)), END]
    with start(script).client() as client:
        chunks = frames(client.post(CHAT, json={**ASK, "stream": True}).text)
    texts = [c["choices"][0]["delta"].get("content") for c in chunks[:-1]]
    assert "".join(filter(None, texts)) == "a" * 200
    assert len(chunks) < 20


# ---- budgets ------------------------------------------------------------------------------------


def test_requests_a_minute_are_limited_per_key_with_headers_and_retry_after(start: Start) -> None:
    served = start(rate_limit_requests=2)
    with served.client() as client:
        answers = [client.post(CHAT, json=ASK) for _ in range(3)]
    assert [a.status_code for a in answers] == [200, 200, 429]
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "1"
    assert int(answers[2].headers["retry-after"]) >= 1
    with served.client(key=served.keys.guest_key("192.0.2.1")) as other:
        assert other.post(CHAT, json=ASK).status_code == 200


def test_requests_at_once_are_limited_and_a_closed_one_gives_its_place_back(start: Start) -> None:
    engine = ScriptedEngine([Say(ids("ab")), HANG], eos_ids={END})
    served = start(engine, rate_limit_concurrent=1)
    with served.client() as client:
        with client.stream("POST", CHAT, json={**ASK, "stream": True}) as first:
            assert first.status_code == 200
            with served.client() as other:
                assert other.post(CHAT, json=ASK).status_code == 429
        assert engine.wait_until_idle(3)
        engine.script = HELLO
        assert client.post(CHAT, json=ASK).status_code == 200


def test_the_openapi_description_can_be_made(tmp_path: Path) -> None:
    settings: Settings = settings_in(tmp_path)
    keys = KeyRing.from_settings(settings)
    app = FastAPI(**create_api(service_with(ScriptedEngine()), keys, settings))
    assert CHAT in app.openapi()["paths"]
