"""The OpenAPI description, and requests made up from it: no 500, errors always the envelope."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import Case

from openai_compat import create_api
from serve.engine.scripted import Say, ScriptedEngine
from serve.keys import KeyRing
from tests.fakes import CALL, END, SAY, THINK, ids, service_with
from tests.serving import OWNER, settings_in

EXAMPLES = 20
SCRIPT = [THINK, Say(ids("hm")), SAY, Say(ids("Hello")), CALL, Say(ids("f({}")), END]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    chosen = settings_in(tmp_path_factory.mktemp("openapi"))
    service = service_with(ScriptedEngine(SCRIPT, eos_ids={END}))
    yield FastAPI(**create_api(service, KeyRing.from_settings(chosen), chosen))


@pytest.fixture(scope="module")
def described(app: FastAPI) -> Any:
    return schemathesis.openapi.from_asgi("/openapi.json", app)


OPERATIONS = [
    "GET /health", "GET /ready", "GET /version", "GET /v1/models", "GET /v1/models/{name}",
    "POST /v1/chat/completions", "POST /v1/completions", "POST /v1/responses",
    "POST /v1/responses/input_tokens", "GET /v1/responses/{response_id}",
    "DELETE /v1/responses/{response_id}", "POST /v1/responses/{response_id}/cancel",
    "GET /v1/responses/{response_id}/input_items",
]  # fmt: skip


@pytest.mark.parametrize("label", OPERATIONS)
def test_no_request_made_up_from_the_description_gives_a_500(described: Any, label: str) -> None:
    found = [result.ok() for result in described.get_all_operations()]
    operation = next(one for one in found if one.label == label)

    @given(case=operation.as_strategy())
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    def holds(case: Case) -> None:
        answer = case.call(headers={"x-api-key": OWNER})
        assert answer.status_code < 500, (case.body, answer.text)
        if answer.status_code >= 400 and label.partition(" ")[2].startswith("/v1"):
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"] and error["type"]
        if answer.status_code == 200:
            kind = answer.headers["content-type"][0].split(";")[0]
            assert kind in ("application/json", "text/event-stream")

    holds()


def test_the_description_names_every_route_its_key_and_its_fields(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    assert {"/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/models",
            "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel",
            "/v1/responses/{response_id}/input_items", "/v1/responses/input_tokens",
            "/health", "/ready", "/version"} <= set(paths)  # fmt: skip
    chat = paths["/v1/chat/completions"]["post"]
    body = chat["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "tools", "temperature"} <= set(body["properties"])
    assert "audio" not in body["properties"], "what is refused is not offered"
    assert {"400", "401", "429", "503"} <= set(chat["responses"])
