"""The whole app as a ZeroGPU Space starts it: `python app.py`, the real `spaces` package, an
emulated device service, a worker process for a lent GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from tests.conftest import KEY, ROOT, RunningApp, start
from tests.fake_zerogpu import TOKEN, Scheduler, scheduling
from tests.tiny import tiny_gpt_oss, tiny_llama

QUOTA = (429, {}, {"left": 3, "wait": 90})
NO_GPU = (503, {}, {})
BODY = {
    "model": "default",
    "max_tokens": 6,
    "temperature": 0,
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting'"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]


@contextmanager
def space(folder: Path, model: Path, kind: str, scheduler: Scheduler) -> Iterator[RunningApp]:
    app = start(
        folder,
        MODEL_LOCAL_PATH=str(model),
        PYTHONPATH=str(ROOT / "tests" / "zerogpu"),
        ZEROGPU_EMULATED=kind,
        SPACES_ZERO_GPU="true",
        SPACES_ZERO_DEVICE_API_URL=scheduler.url,
        ZEROGPU_OFFLOAD_DIR=str(folder / "offload"),
    )
    try:
        app.wait("/ready", 120)
        yield app
    finally:
        app.stop()


@pytest.fixture(scope="module")
def scheduler() -> Iterator[Scheduler]:
    with scheduling() as running:
        yield running


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, scheduler: Scheduler) -> Iterator[RunningApp]:
    folder = tmp_path_factory.mktemp("space")
    with space(folder, tiny_llama(folder / "tiny-llama"), "cpu", scheduler) as running:
        yield running


@pytest.fixture
def client(app: RunningApp, scheduler: Scheduler) -> Iterator[httpx.Client]:
    """As a caller with a Hugging Face token of their own sends requests through its proxy."""
    scheduler.refusal = None
    with app.client(None) as made:
        made.headers.update(
            {"X-API-Key": KEY, "Authorization": "Bearer hf_visitor", "X-IP-Token": TOKEN}
        )
        yield made


def frames(client: httpx.Client, **more: Any) -> list[dict[str, Any]]:
    body = {**BODY, "stream": True, **more}
    with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        data = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(frame) for frame in data[:-1]]


def on_the_page(client: httpx.Client) -> dict[str, Any]:
    """The last snapshot of one turn, asked of the page's generator event as a browser asks it."""
    events = client.get("/config").json()["dependencies"]
    number = next(i for i, event in enumerate(events) if len(event["inputs"]) == 3)
    turn = {"question": "q", "answer": "a", "text": "Hello", "options": {"max_tokens": 6}}
    asked = {
        "data": [{"text": "", "files": []}, turn, None],
        "fn_index": number,
        "session_hash": "visit",
    }
    assert client.post("/gradio_api/queue/join", json=asked).status_code == 200
    with client.stream("GET", "/gradio_api/queue/data?session_hash=visit") as answer:
        told = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
    (completed,) = [news for news in told if news["msg"] == "process_completed"]
    return dict(completed["output"]["data"][0])


def test_it_reports_to_the_platform_before_it_serves(app: RunningApp, scheduler: Scheduler) -> None:
    assert scheduler.calls[0][0] == "/startup-report"
    assert app.wait("/ready", 1).json()["status"] == "ready"


def test_the_api_answers_whole_and_streamed_with_the_same_words(
    client: httpx.Client, scheduler: Scheduler
) -> None:
    before = len(scheduler.asked("/schedule"))
    whole = client.post("/v1/chat/completions", json=BODY)
    assert whole.status_code == 200, whole.text
    told = whole.json()
    assert told["usage"]["completion_tokens"] == 6
    streamed = "".join(
        choice["delta"].get("content") or "" for f in frames(client) for choice in f["choices"]
    )
    assert streamed == told["choices"][0]["message"]["content"]
    asked = scheduler.asked("/schedule")[before:]
    assert len(asked) == 2 and all(query["token"] == TOKEN for query in asked)
    assert asked[0]["durationSeconds"] == "20"


def test_the_worker_is_kept_and_every_lent_gpu_is_given_back(
    client: httpx.Client, scheduler: Scheduler
) -> None:
    for _ in range(2):
        assert client.post("/v1/chat/completions", json=BODY).status_code == 200
    assert len(scheduler.asked("/allow")) <= 1
    assert len(scheduler.asked("/release")) == len(scheduler.asked("/schedule"))


def test_gradio_client_and_the_pages_own_event_are_answered(
    app: RunningApp, client: httpx.Client
) -> None:
    caller = Client(app.base, verbose=False)
    try:
        said = caller.predict("Hello", temperature=0, max_tokens=6, api_name="/chat")
    finally:
        caller.close()
    shown = on_the_page(client)
    assert isinstance(said, str) and said
    assert shown["phase"] == "done" and shown["stats"]["completion_tokens"] == 6


def test_a_spent_quota_is_429_with_the_wait_and_no_free_gpu_503(
    app: RunningApp, client: httpx.Client, scheduler: Scheduler
) -> None:
    scheduler.refusal = QUOTA
    refused = client.post("/v1/chat/completions", json=BODY)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "90")
    assert "quota" in refused.json()["error"]["message"]
    (error,) = [frame["error"] for frame in frames(client) if "error" in frame]
    assert "quota" in error["message"]
    shown = on_the_page(client)
    assert shown["phase"] == "failed" and "quota" in json.dumps(shown["error"])
    scheduler.refusal = NO_GPU
    refused = client.post("/v1/chat/completions", json=BODY)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "30")
    caller = Client(app.base, verbose=False)
    try:
        with pytest.raises(AppError, match="GPU"):
            caller.predict("Hello", api_name="/chat")
    finally:
        caller.close()
    scheduler.refusal = None
    assert client.post("/v1/chat/completions", json=BODY).status_code == 200


def test_weights_are_loaded_and_packed_under_the_platforms_hooks(
    tmp_path: Path, scheduler: Scheduler
) -> None:
    model = tiny_gpt_oss(tmp_path / "tiny-oss", mxfp4=True)
    with space(tmp_path, model, "hooks", scheduler) as running:
        served = running.wait("/ready", 1).json()["model"]
        assert served["quantization"] == "mxfp4"
        with running.client() as client:
            card = client.get("/v1/models").json()["data"][0]
            answer = client.post("/v1/chat/completions", json=BODY)
    assert card["id"] == "tiny-oss"
    packs = list((tmp_path / "offload").iterdir())
    assert packs and packs[0].stat().st_size > 100_000
    assert answer.status_code in (500, 503), "no worker can start without a GPU"
