"""MODEL_SWITCH as a user meets it: two models, the owner's key, a guest's key, and the page's own
address, over HTTP."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import KEY, RunningApp, StartApp
from tests.tiny import tiny_gpt_oss, tiny_llama

pytestmark = pytest.mark.slow
FROM_THE_PAGE = {"sec-fetch-site": "same-origin"}
A_GUEST = {**FROM_THE_PAGE, "x-forwarded-for": "203.0.113.7", "host": "app.example"}


@pytest.fixture
def models(tmp_path: Path) -> str:
    return f"{tiny_llama(tmp_path / 'one')},{tiny_gpt_oss(tmp_path / 'two')}"


def ask(app: RunningApp, key: str, model: str) -> httpx.Response:
    body: dict[str, Any] = {"model": model, "max_tokens": 2}
    body["messages"] = [{"role": "user", "content": "Hello"}]
    with app.client(key) as client:
        return client.post("/v1/chat/completions", json=body)


def choose(app: RunningApp, headers: dict[str, str], model: str) -> int:
    with app.client(None) as client:
        return client.post("/ui/model", headers=headers, json={"model": model}).status_code


def guest_key(app: RunningApp) -> str:
    with app.client(None) as client:
        offered = client.get("/ui/key", headers=A_GUEST).json()
    assert offered["kind"] == "guest", offered
    return str(offered["key"])


def patiently(app: RunningApp, key: str, model: str) -> httpx.Response:
    limit = time.monotonic() + 60
    while (answer := ask(app, key, model)).status_code == 503 and time.monotonic() < limit:
        assert answer.headers["retry-after"]
        time.sleep(0.3)
    return answer


def offered(app: RunningApp) -> list[str]:
    """Once the other models have been looked at, which is after the first serves."""
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        with app.client() as client:
            names = client.get("/ready").json()["offered"]
        if names:
            return list(names)
        time.sleep(0.2)
    raise AssertionError(app.log[-4000:])


@pytest.mark.parametrize(("setting", "who"), [("off", ""), ("owner", "owner"), ("all", "guest")])
def test_a_model_is_switched_by_whom_the_setting_says(
    models: str, start_app: StartApp, setting: str, who: str
) -> None:
    app = start_app(MODEL_IDS=models, MODEL_SWITCH=setting, KEY_DISPLAY="guest")
    app.wait("/ready", 120)
    assert offered(app) == ["one", "two"]
    guest = guest_key(app)
    assert ask(app, guest, "one").status_code == ask(app, KEY, "default").status_code == 200

    refused = ask(app, guest, "two") if who != "guest" else None
    if refused is not None:
        assert refused.status_code == 403
        assert "MODEL_SWITCH" in refused.json()["error"]["message"]
        assert choose(app, A_GUEST, "two") == 403
    if not who:
        assert ask(app, KEY, "two").status_code == 403
        assert choose(app, FROM_THE_PAGE, "two") == 403
        assert ask(app, KEY, "default").json()["model"] == "one"
        return

    key, page = guest, A_GUEST
    if who == "owner":
        link = re.search(r"#owner=(\S+)", app.log)
        assert link, app.log
        key, page = KEY, {**FROM_THE_PAGE, "x-owner-token": link[1]}
    first = ask(app, key, "two")
    assert first.status_code == 503 and first.headers["retry-after"], first.text
    assert patiently(app, key, "two").json()["model"] == "two"
    assert choose(app, page, "one") == 200
    assert patiently(app, key, "one").json()["model"] == "one"
    assert choose(app, {}, "two") == 403, "another site's page"
    assert choose(app, page, "three") == 404
