"""The API on Gradio's own app: both live side by side, and a browser elsewhere may call ours."""

from __future__ import annotations

import contextlib
import gc
import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest

from openai_compat import create_api
from serve.engine.scripted import HANG, Say, ScriptedEngine
from serve.keys import KeyRing
from tests.browser import chromium
from tests.fakes import END, ids, service_with
from tests.serving import OWNER, settings_in

# Gradio's launch and the browser's driver leave sockets to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine([Say(ids("Hello")), END], eos_ids={END})


@pytest.fixture(scope="module")
def base(engine: ScriptedEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = settings_in(tmp_path_factory.mktemp("gradio"))
    port = free_port()
    with gr.Blocks() as page:
        gr.Markdown("hello")
    page.launch(
        server_name="127.0.0.1",
        server_port=port,
        prevent_thread_lock=True,
        ssr_mode=False,
        quiet=True,
        app_kwargs=create_api(service_with(engine), KeyRing.from_settings(settings), settings),
    )
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)
    gc.collect()


@pytest.fixture
def client(base: str, engine: ScriptedEngine) -> Iterator[httpx.Client]:
    engine.script = [Say(ids("Hello")), END]
    with httpx.Client(base_url=base, headers={"x-api-key": OWNER}, timeout=20) as client:
        yield client


def test_the_page_and_the_api_answer_on_one_port_each_with_its_own_errors(
    client: httpx.Client,
) -> None:
    assert client.get("/").status_code == client.get("/config").status_code == 200
    assert OWNER not in client.get("/").text + client.get("/config").text
    assert client.post(CHAT, json=ASK).json()["choices"][0]["message"]["content"] == "Hello"
    assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert "detail" in client.get("/gradio_api/nothing").json()
    assert CHAT in client.get("/openapi.json").json()["paths"]


def test_a_stream_is_not_held_back_and_not_compressed(
    client: httpx.Client, engine: ScriptedEngine
) -> None:
    engine.script = [Say(ids("ab")), HANG]
    body = {**ASK, "stream": True}
    began = time.monotonic()
    with client.stream("POST", CHAT, json=body, headers={"accept-encoding": "br, gzip"}) as answer:
        assert "content-encoding" not in answer.headers
        text = ""
        for piece in answer.iter_text():
            text += piece
            if '"content":"ab"' in text:
                break
        assert time.monotonic() - began < 5
    assert engine.wait_until_idle(3), "leaving stops the work under Gradio too"


@pytest.mark.parametrize("origin", ["https://app.example", "null"])
def test_a_deployed_server_answers_preflights_of_any_origin(
    client: httpx.Client, origin: str
) -> None:
    asked = {
        "host": "space.example",
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    preflight = client.request("OPTIONS", CHAT, headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == origin
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    answer = client.post(CHAT, json=ASK, headers={"host": "space.example", "origin": origin})
    assert answer.headers["access-control-allow-origin"] == origin


def test_a_local_server_lets_no_foreign_page_in(client: httpx.Client) -> None:
    asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    preflight = client.request("OPTIONS", CHAT, headers=asked)
    assert "access-control-allow-origin" not in preflight.headers


@contextlib.contextmanager
def elsewhere(folder: Path) -> Iterator[str]:
    """A page of another origin on this machine."""
    (folder / "index.html").write_text("<!doctype html><title>elsewhere</title>")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Quiet, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://localhost:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


SCRIPT = """async ({base, key, body}) => {
  const ask = (extra) => fetch(base + "/v1/chat/completions", {method: "POST",
    headers: {"Authorization": "Bearer " + key, "Content-Type": "application/json"},
    body: JSON.stringify({...body, ...extra})});
  const whole = await (await ask({})).json();
  const streamed = await (await ask({stream: true})).text();
  const wrong = await ask({temperature: 99});
  const shown = await fetch(base + "/ui/key").then((r) => r.status, () => "blocked");
  return {whole, streamed, status: wrong.status, error: (await wrong.json()).error, shown};
}"""


@pytest.mark.browser
def test_a_browser_at_another_origin_may_ask_with_a_key_and_cannot_get_the_pages_key(
    base: str, client: httpx.Client, tmp_path: Path
) -> None:
    assert client.get("/health").status_code == 200
    with elsewhere(tmp_path) as address, chromium() as browser:
        page = browser.new_page()
        page.goto(address)
        found = page.evaluate(SCRIPT, {"base": base, "key": OWNER, "body": ASK})
    assert found["whole"]["choices"][0]["message"]["content"] == "Hello"
    assert json.loads(found["streamed"].split("\n\n")[1][6:])["object"] == "chat.completion.chunk"
    assert found["status"] == 400 and found["error"]["param"] == "temperature"
    assert found["shown"] in (403, "blocked")
