"""The endpoints that gradio_client calls, over a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from serve.errors import Overloaded
from tests.page_server import ANSWERS, PageServer, start, untidy
from tests.text_format import BETWEEN

pytestmark = [
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting'"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    running = start(tmp_path_factory.mktemp("page"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def client(server: PageServer) -> Client:
    with untidy():
        return Client(server.url, verbose=False)


def given(server: PageServer) -> list[str]:
    return bytes(server.engine.submitted[-1].prompt.ids).decode().split(BETWEEN)


def test_only_three_endpoints_are_public(client: Client) -> None:
    api: Any = client.view_api(return_format="dict")
    assert sorted(api["named_endpoints"]) == ["/chat", "/chat_structured", "/models"]
    parameters = [p["parameter_name"] for p in api["named_endpoints"]["/chat"]["parameters"]]
    assert parameters[:6] == [
        "message", "history", "system", "model", "reasoning_effort", "temperature",
    ]  # fmt: skip


def test_a_message_alone_is_enough_and_the_answer_streams(client: Client) -> None:
    assert client.predict("hello", api_name="/chat") == ANSWERS["hello"]
    pieces = list(client.submit("slow", api_name="/chat"))
    assert len(pieces) > 5 and pieces[-1] == ANSWERS["slow"]
    assert all(b.startswith(a) for a, b in zip(pieces, pieces[1:], strict=False))


def test_calls_are_stateless_and_history_and_options_are_given(
    client: Client, server: PageServer
) -> None:
    history = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": [{"type": "text", "text": "1"}]},
    ]
    client.predict(
        message={"text": "two", "files": []},
        history=history,
        system="Count.",
        temperature=0.2,
        max_tokens=9,
        api_name="/chat",
    )
    assert given(server) == ["system: Count.", "one", "1", "two"]
    assert server.engine.submitted[-1].sampling.max_tokens == 9
    client.predict("alone", api_name="/chat")
    assert given(server) == ["alone"]


def test_the_structured_answer_has_reasoning_calls_and_numbers(client: Client) -> None:
    thought = client.predict("think", api_name="/chat_structured")
    assert thought["text"] == "The answer is **42**."
    assert thought["reasoning"].startswith("First, let me think.")
    assert thought["finish_reason"] == "stop" and thought["usage"]["completion_tokens"] > 10
    called = client.predict("tool", api_name="/chat_structured")
    assert called["tool_calls"][0]["name"] == "get_weather"
    assert called["finish_reason"] == "tool_calls"


def test_files_are_read_and_a_picture_for_a_blind_model_is_a_note(
    client: Client, tmp_path: Path
) -> None:
    note = tmp_path / "note.txt"
    note.write_text("the secret word is plum")
    picture = Path(__file__).parent.parent / "assets" / "favicon.png"
    files = [handle_file(str(note)), handle_file(str(picture))]
    answer = client.predict("read", files=files, api_name="/chat_structured")
    assert "the secret word is plum" in answer["text"]
    assert [n["code"] for n in answer["notes"]] == ["images_not_used"]


def test_a_path_of_the_server_is_not_read(client: Client) -> None:
    for path in ("/etc/passwd", str(Path(__file__))):
        with pytest.raises(AppError, match="must be uploaded"):
            client.predict("read", files=[{"path": path}], api_name="/chat")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"message": 7}, "message must be"),
        ({"message": "x", "history": [{"role": "king", "content": ""}]}, "role must be"),
        ({"message": "x", "temperature": 9}, "temperature must be"),
        ({"message": "x", "model": "nobody/nothing"}, "model_not_found"),
    ],
)
def test_a_wrong_call_names_the_field(
    client: Client, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(AppError, match=words):
        client.predict(**arguments, api_name="/chat")


def test_an_error_of_the_model_has_the_apis_own_words(client: Client, server: PageServer) -> None:
    server.engine.refusal = Overloaded("Too many requests are waiting. Try again in 2 s.")
    try:
        with pytest.raises(AppError, match="overloaded: Too many requests"):
            client.predict("hello", api_name="/chat")
    finally:
        server.engine.refusal = None
    with pytest.raises(AppError, match="engine_error"):
        client.predict("middle", api_name="/chat")


def test_a_cancelled_job_stops_the_work(client: Client, server: PageServer) -> None:
    job = client.submit("hang", api_name="/chat")
    while not job.outputs():
        pass
    job.cancel()
    assert server.engine.wait_until_idle(3)
