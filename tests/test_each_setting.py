"""Tried as a new user would: each variable of README's table alone, on an empty machine. The app
serves, or says clearly why not."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.settings import VARIABLES
from tests.conftest import RunningApp, free_port, start
from tests.fake_git import FakeGit, serving_git
from tests.fake_hub import FakeHub, repository_of, serving
from tests.tiny import tiny_gpt_oss, tiny_llama

EMBEDDED = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUBS = ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT", "OPENXLAB_ENDPOINT")
ASK = {"model": "default", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}
SECONDS = 240


@dataclass
class World:
    """What is around the empty machine: a hub with a small model, a git server, this folder."""

    hub: FakeHub
    git: FakeGit
    folder: Path
    model: Path

    def environment(self) -> dict[str, str]:
        """The internet, as far as it is not one variable's own business."""
        return {
            **dict.fromkeys(HUBS, self.hub.base),
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{self.git.base}/.insteadOf",
            "GIT_CONFIG_VALUE_0": "https://git.example/",
            "APP_API_KEY": "",
            "HOME": str(self.folder),
        }


@dataclass
class Tried:
    """One start of the app that has come to its end: it serves, failed to load, or left."""

    app: RunningApp
    ready: dict[str, Any] = field(default_factory=dict)

    def key(self) -> str:
        found = re.search(r"API key: (sk-\S+)", self.app.log)
        assert found, self.app.log
        return found[1]

    def ask(self, key: str = "", **more: Any) -> httpx.Response:
        with self.app.client(key or self.key()) as client:
            return client.post("/v1/chat/completions", json={**ASK, **more})


Check = Callable[[Tried, World], None]
Value = str | Callable[[World], str]


def serves(model: str = EMBEDDED) -> Check:
    def check(tried: Tried, _: World) -> None:
        assert tried.ready["ready"], tried.app.log[-4000:]
        assert tried.ready["model"]["id"] == model
        answer = tried.ask()
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] > 0

    return check


def serves_and_logs(words: str) -> Check:
    def check(tried: Tried, world: World) -> None:
        serves()(tried, world)
        assert words in tried.app.log

    return check


def cannot_load(*words: str) -> Check:
    """Nothing serves: /ready and every answer say so, with the reason and what to set."""

    def check(tried: Tried, _: World) -> None:
        assert tried.ready["status"] == "failed"
        told = tried.ready["progress"]["detail"]
        assert all(word in told for word in words), told
        answer = tried.ask()
        assert answer.status_code == 503 and "/ready" in answer.json()["error"]["message"]

    return check


def leaves(*words: str) -> Check:
    def check(tried: Tried, _: World) -> None:
        assert tried.app.process.wait(5) == 2
        lines = tried.app.log.strip().splitlines()
        assert len(lines) == 1 and all(word in lines[0] for word in words), lines

    return check


def key_is_obeyed(tried: Tried, _: World) -> None:
    assert tried.ask("a-key-of-my-own").status_code == 200
    assert tried.ask("another-key").status_code == 401


def keeps_its_data_there(tried: Tried, world: World) -> None:
    serves()(tried, world)
    kept = world.folder / "work" / "gpt_oss_app_runtime"
    assert (kept / "owner_key").exists() and list((kept / "models").iterdir())


def context_is_short(tried: Tried, _: World) -> None:
    assert tried.ready["model"]["context_length"] == 256
    assert tried.ask(messages=[{"role": "user", "content": "word " * 400}]).status_code == 400


def second_request_is_too_much(tried: Tried, _: World) -> None:
    assert tried.ask().status_code == 200
    refused = tried.ask()
    assert refused.status_code == 429 and refused.headers["retry-after"]


def listens_on_ipv6(tried: Tried, _: World) -> None:
    port = tried.app.port
    assert httpx.get(f"http://[::1]:{port}/ready", timeout=10).status_code == 200
    assert f"http://[::1]:{port}/v1" in tried.app.log


def link(world: World) -> str:
    return str(world.model)


CASES: list[tuple[str, Value, Check]] = [
    ("APP_API_KEY", "a-key-of-my-own", key_is_obeyed),
    ("APP_API_KEY", "short", leaves("APP_API_KEY", "at least 8")),
    ("WORK_DIR", lambda world: str(world.folder / "work"), keeps_its_data_there),
    ("WORK_DIR", "/proc/nowhere", leaves("WORK_DIR", "/proc/nowhere")),
    ("MODEL_LOCAL_PATH", link, serves("tiny-llama")),
    ("MODEL_LOCAL_PATH", "/no/such/folder", serves_and_logs("/no/such/folder: there is no such")),
    ("OPENXLAB_MODEL_REPO", "o/tiny-llama", serves("o/tiny-llama")),
    ("OPENXLAB_ENDPOINT", "http://127.0.0.1:9", serves()),
    ("OPENXLAB_AK", "my-key", serves_and_logs("OPENXLAB_AK has no effect without OPENXLAB_SK")),
    ("OPENXLAB_SK", "my-key", serves_and_logs("OPENXLAB_SK has no effect without OPENXLAB_AK")),
    ("OPENXLAB_MODEL_REPO_URL", "https://git.example/model.git", serves("model")),
    ("OPENXLAB_MODEL_REPO_URL", "ftp://x/y", leaves("OPENXLAB_MODEL_REPO_URL", "https://")),
    ("OPENXLAB_MODEL_SUBDIR", "x", serves_and_logs("OPENXLAB_MODEL_SUBDIR has no effect")),
    ("MODELSCOPE_ID", "o/tiny-llama", serves("o/tiny-llama")),
    ("MODEL_IDS", "no/such,o/tiny-oss", serves("o/tiny-oss")),
    ("HF_MODEL_ID", "o/tiny-llama", serves("o/tiny-llama")),
    ("HF_ENDPOINT", "http://127.0.0.1:9", serves()),
    ("HF_ENDPOINT", "hf-mirror.com", leaves("HF_ENDPOINT", "https://")),
    ("HF_TOKEN", "hf_mine", serves()),
    ("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9", serves()),
    ("MODELSCOPE_API_TOKEN", "mine", serves()),
    ("HUB_ORDER", "modelscope,huggingface", serves()),
    ("QUANT_TYPE", "int8", serves()),
    ("QUANT_TYPE", "full", serves()),
    ("QUANT_TYPE", "awq", cannot_load("QUANT_TYPE=awq", "Set QUANT_TYPE=auto")),
    ("QUANT_TYPE", "bnb4", cannot_load("QUANT_TYPE=bnb4", "Set QUANT_TYPE=auto")),
    ("DENSE_BITS", "8", serves_and_logs("DENSE_BITS=8 has no effect")),
    ("MODEL_SWITCH", "all", serves()),
    ("HOST", "::1", listens_on_ipv6),
    ("HOST", "nonsense.invalid", leaves("HOST=nonsense.invalid", "not known")),
    ("PORT", lambda _: str(free_port()), serves()),
    ("PORT", "http", leaves("PORT", "whole number")),
    ("KEY_DISPLAY", "off", serves()),
    ("KV_CACHE_GB", "0.05", serves()),
    ("MAX_CONTEXT", "256", context_is_short),
    ("ALLOW_IMAGE_URLS", "on", serves()),
    ("IMAGE_FALLBACK", "drop", serves()),
    ("RATE_LIMIT_REQUESTS", "1", second_request_is_too_much),
    ("RATE_LIMIT_TOKENS", "10000", serves()),
    ("RATE_LIMIT_CONCURRENT", "1", serves()),
    ("SPACES_ZERO_GPU", "true", leaves("SPACES_ZERO_GPU", "SPACES_ZERO_DEVICE_API_URL")),
]
QUICK = {("MODEL_IDS", 0), ("OPENXLAB_MODEL_REPO_URL", 0), ("WORK_DIR", 1), ("SPACES_ZERO_GPU", 0)}


def parameters() -> Iterator[Any]:
    seen: dict[str, int] = {}
    for variable, value, check in CASES:
        number = seen.setdefault(variable, 0)
        seen[variable] += 1
        marks = [] if (variable, number) in QUICK else [pytest.mark.slow, pytest.mark.real]
        yield pytest.param(variable, value, check, id=f"{variable}-{number}", marks=marks)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    model = tiny_llama(tmp_path / "tiny-llama")
    files = repository_of(model)
    with ExitStack() as stack:
        oss = repository_of(tiny_gpt_oss(tmp_path / "tiny-oss", mxfp4=True))
        hub = stack.enter_context(serving(FakeHub({"o/tiny-llama": files, "o/tiny-oss": oss})))
        git = stack.enter_context(serving_git(FakeGit(tmp_path / "git", dict(files))))
        yield World(hub, git, tmp_path, model)


@pytest.mark.parametrize(("variable", "value", "check"), list(parameters()))
def test_each_variable_alone_serves_or_says_why_not(
    world: World, variable: str, value: Value, check: Check
) -> None:
    if variable == "OPENXLAB_MODEL_REPO_URL" and shutil.which("git-lfs") is None:
        pytest.skip("git-lfs is not installed")
    alone = value if isinstance(value, str) else value(world)
    empty = world.folder / "empty"
    empty.mkdir()
    app = start(empty, **{**world.environment(), variable: alone})
    if variable == "PORT" and alone.isdigit():
        app = RunningApp(app.process, int(alone), app.log_file)
    try:
        check(settled(app, "[::1]" if variable == "HOST" else "127.0.0.1"), world)
        assert "Traceback" not in app.log
    finally:
        app.stop()


def settled(app: RunningApp, host: str) -> Tried:
    """The app once it serves, has failed to load, or has ended."""
    limit = time.monotonic() + SECONDS
    while time.monotonic() < limit and app.process.poll() is None:
        try:
            told = httpx.get(f"http://{host}:{app.port}/ready", timeout=10).json()
        except (httpx.TransportError, ValueError):
            told = {"status": "starting"}
        if told["status"] in ("ready", "failed"):
            return Tried(app, told)
        time.sleep(0.2)
    assert app.process.poll() is not None, f"it never came to an end:\n{app.log[-4000:]}"
    return Tried(app)


def test_every_variable_of_the_table_is_tried() -> None:
    assert {variable for variable, _, _ in CASES} == {name for name, _, _ in VARIABLES}
