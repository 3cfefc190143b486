"""The whole road, as a new user goes it: the real process, a real model, every kind of client."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import threading
import time
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from playwright.sync_api import sync_playwright

from tests.conftest import KEY, ROOT, RunningApp, StartApp, free_port

QUESTION = "What is the capital of France?"
BODY = {
    "model": "gpt-oss:20b",
    "temperature": 0,
    "max_tokens": 32,
    "messages": [{"role": "user", "content": QUESTION}],
}


@pytest.mark.real
class TestTheEmbeddedModel:
    def test_ready_says_which_model_serves_and_why_not_the_one_asked_for(
        self, embedded_app: RunningApp
    ) -> None:
        ready = httpx.get(f"{embedded_app.base}/ready", timeout=10).json()
        assert "SmolLM2" in ready["model"]["id"]
        passed = json.dumps(ready["passed_over"])
        assert "gpt-oss" in passed
        assert "SmolLM2" in embedded_app.log

    def test_it_answers_curl(self, embedded_app: RunningApp) -> None:
        curl = shutil.which("curl")
        assert curl, "curl is needed for this test: apt-get install curl"
        done = subprocess.run(
            [
                curl,
                "-sS",
                f"{embedded_app.base}/v1/chat/completions",
                "-H",
                f"Authorization: Bearer {KEY}",
                "-H",
                "Content-Type: application/json",
                "-d",
                json.dumps(BODY),
            ],
            capture_output=True,
            timeout=120,
            check=True,
        )
        assert "Paris" in json.loads(done.stdout)["choices"][0]["message"]["content"]

    def test_it_answers_the_openai_package_whole_and_streamed_with_the_same_words(
        self, embedded_app: RunningApp
    ) -> None:
        client = OpenAI(base_url=f"{embedded_app.base}/v1", api_key=KEY, max_retries=0)
        with client:
            whole = client.chat.completions.create(**BODY)
            chunks = list(client.chat.completions.create(**BODY, stream=True))
            assert "SmolLM2" in client.models.list().data[0].id
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert "Paris" in whole.choices[0].message.content
        assert text == whole.choices[0].message.content
        assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason

    def test_it_answers_gradio_client(self, embedded_app: RunningApp) -> None:
        from gradio_client import Client

        client = Client(embedded_app.base, verbose=False)
        try:
            answer = client.predict(QUESTION, temperature=0, api_name="/chat")
        finally:
            client.close()
        assert "Paris" in answer

    @pytest.mark.browser
    def test_it_answers_in_a_browser(self, embedded_app: RunningApp) -> None:
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        assert chromium, "Chromium is needed for this test: apt-get install chromium"
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-sync"]
            )
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(embedded_app.base)
            box = page.get_by_role("textbox").last
            # The page's own default draws; asked so, even a small model leaves no doubt.
            box.fill("Answer with one word only. What is the capital of France?")
            box.press("Enter")
            page.get_by_text("Paris").first.wait_for(timeout=60_000)
            browser.close()

    def test_a_seed_gives_the_same_words_whatever_else_runs(self, embedded_app: RunningApp) -> None:
        body = {**BODY, "temperature": 1.0, "seed": 7, "max_tokens": 24}
        with embedded_app.client() as client:
            alone = client.post("/v1/chat/completions", json=body).json()
            noise = threading.Thread(
                target=client.post,
                args=("/v1/chat/completions",),
                kwargs={"json": {**BODY, "temperature": 1.0, "max_tokens": 60}},
            )
            noise.start()
            beside = client.post("/v1/chat/completions", json=body).json()
            noise.join()
        assert alone["choices"][0]["message"] == beside["choices"][0]["message"]

    def test_a_wrong_key_is_401_in_the_envelope(self, embedded_app: RunningApp) -> None:
        with embedded_app.client("wrong-key-entirely") as client:
            answer = client.post("/v1/chat/completions", json=BODY)
        assert answer.status_code == 401
        assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}


def test_a_bad_setting_ends_with_code_2_and_one_line(start_app: StartApp) -> None:
    app = start_app(QUANT_TYPE="int3")
    assert app.process.wait(30) == 2
    lines = app.log.strip().splitlines()
    assert len(lines) == 1 and "QUANT_TYPE" in lines[0] and "int3" in lines[0]


def test_a_busy_port_ends_with_code_2_and_names_it(start_app: StartApp) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        port = str(taken.getsockname()[1])
        app = start_app(PORT=port)
        assert app.process.wait(30) == 2
    assert port in app.log


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_a_local_safetensors_folder_is_served(
    kind: str, tmp_path: Path, start_app: StartApp
) -> None:
    from tests import tiny

    folder = tmp_path / f"tiny-{kind}"
    {"llama": tiny.tiny_llama, "gpt_oss": tiny.tiny_gpt_oss}[kind](folder)
    app = start_app(MODEL_LOCAL_PATH=str(folder))
    ready = app.wait("/ready", 120).json()
    assert ready["model"]["id"].endswith(folder.name)
    with app.client() as client:
        answer = client.post("/v1/chat/completions", json={**BODY, "max_tokens": 8})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] >= 1


def test_sigterm_while_a_stream_runs_ends_the_stream_and_the_process_cleanly(
    tmp_path: Path, start_app: StartApp
) -> None:
    from tests import tiny

    folder = tmp_path / "tiny-llama"
    tiny.tiny_llama(folder)
    app = start_app(MODEL_LOCAL_PATH=str(folder))
    app.wait("/ready", 120)
    lines: list[str] = []
    body = {**BODY, "stream": True, "max_tokens": 100_000, "ignore_eos": True}

    def read() -> None:
        with app.client() as client, client.stream("POST", "/v1/chat/completions", json=body) as s:
            lines.extend(line for line in s.iter_lines() if line)

    reader = threading.Thread(target=read)
    reader.start()
    limit = time.monotonic() + 30
    while len(lines) < 3 and time.monotonic() < limit:
        time.sleep(0.05)
    began = time.monotonic()
    assert app.stop(15) == 0
    assert time.monotonic() - began < 10
    reader.join(10)
    assert not reader.is_alive()
    assert lines[-1] == "data: [DONE]"
    last = json.loads(lines[-2].removeprefix("data: "))
    assert "error" in last or last["choices"][0]["finish_reason"] in ("stop", "length")


def test_the_start_file_parses_on_old_pythons() -> None:
    ast.parse((ROOT / "app.py").read_text(), feature_version=(3, 7))
    ast.parse((ROOT / "serve" / "bootstrap.py").read_text(), feature_version=(3, 7))
