"""OpenXLab: its real SDK, run apart from us, against a service with its API's shapes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.sources import openxlab
from serve.sources.download import download
from serve.sources.http import create_client
from serve.sources.meter import Meter
from serve.sources.offer import SourceFailed
from tests.fake_hub import FakeHub, schedule, serving
from tests.fake_registry import registry_with
from tests.openxlab_sdk import openxlab_sdk  # noqa: F401

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"w" * 50_000,
    "meta/notes.json": b"never fetched",
}
KEYS = ("my-access-key", "my-secret-key")


@pytest.fixture
def sdk(openxlab_sdk: Path) -> Path:  # noqa: F811
    return openxlab_sdk


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving(FakeHub({"some-owner/gpt.oss": dict(FILES)}, keys={"ak": KEYS[0]})) as running:
        yield running


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with create_client() as made:
        made.timeout = httpx.Timeout(0.5)
        yield made


@pytest.mark.real
def test_the_sdk_lists_and_our_downloader_fetches(
    hub: FakeHub, client: httpx.Client, sdk: Path, tmp_path: Path
) -> None:
    hub.faults = schedule([("cut", 0.5), ("503", 0)])
    offer = openxlab.offer(client, hub.base, KEYS, "some-owner/gpt.oss", sdk)
    assert {f.path: f.size for f in offer.files} == {
        "config.json": 23,
        "model.safetensors": 50_000,
    }
    with Meter([].append, "m", openxlab.NAME) as meter:
        download(client, offer, tmp_path, meter)
    assert (tmp_path / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    signed = [path for method, path in hub.requests if "sso-be" in path]
    assert [path.rsplit("/", 1)[-1] for path in signed] == ["auth", "getJwt"]
    assert not any("bury" in path for _, path in hub.requests)  # the SDK's telemetry


@pytest.mark.real
def test_nothing_of_the_sdk_enters_this_process(
    hub: FakeHub, client: httpx.Client, sdk: Path
) -> None:
    openxlab.offer(client, hub.base, ("", ""), "some-owner/gpt.oss", sdk)
    assert "openxlab" not in sys.modules and str(sdk) not in sys.path


@pytest.mark.real
@pytest.mark.parametrize(
    ("fault", "said"), [("503", "503"), ("html", "maintenance"), ("json", "refused")]
)
def test_an_answer_that_is_none_leads_on_quickly(
    hub: FakeHub, client: httpx.Client, sdk: Path, fault: str, said: str
) -> None:
    hub.listing_faults = deque([fault])
    before = time.monotonic()
    with pytest.raises(SourceFailed) as failed:
        openxlab.offer(client, hub.base, ("", ""), "some-owner/gpt.oss", sdk)
    assert said in failed.value.reason and failed.value.fix
    assert time.monotonic() - before < 10


@pytest.mark.real
def test_silence_leads_on_when_the_time_is_over(
    hub: FakeHub, client: httpx.Client, sdk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openxlab, "LISTING_SECONDS", 2.0)
    hub.stall_seconds = 5
    hub.listing_faults = deque(["stall"])
    with pytest.raises(SourceFailed, match="does not answer"):
        openxlab.offer(client, hub.base, ("", ""), "some-owner/gpt.oss", sdk)


@pytest.mark.real
def test_wrong_keys_are_told_without_them(hub: FakeHub, client: httpx.Client, sdk: Path) -> None:
    with pytest.raises(SourceFailed) as failed:
        openxlab.offer(client, hub.base, ("wrong-key", "wrong"), "some-owner/gpt.oss", sdk)
    assert "wrong-key" not in failed.value.reason + failed.value.fix
    assert "keys are wrong" in failed.value.reason


def test_without_a_package_registry_the_fix_is_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setattr(openxlab, "SDK", "no-such-package-here==0.0.0")
    with pytest.raises(SourceFailed) as failed:
        openxlab.install_sdk(tmp_path / "sdk")
    assert "pip install --no-deps" in failed.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["sdk.lock"]


def test_a_registry_may_be_slow_as_long_as_pip_is_patient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip waits for as long as its user says, and as it would alone if nobody says: nothing that
    bounds its patience is passed to it."""
    commands: list[list[str]] = []
    start = subprocess.Popen

    def noted(command: list[str], **options: Any) -> Any:
        commands.append(command)
        assert "env" not in options
        return start(command, **options)

    monkeypatch.setattr(subprocess, "Popen", noted)
    monkeypatch.setattr(openxlab, "SDK", "openxlab==9.9.9")
    monkeypatch.setattr(openxlab, "SDK_EXTRAS", ())
    monkeypatch.setenv("PIP_RETRIES", "0")
    with registry_with("openxlab", "9.9.9", seconds=0.8) as index:
        monkeypatch.setenv("PIP_INDEX_URL", index)
        monkeypatch.setenv("PIP_DEFAULT_TIMEOUT", "0.3")
        with pytest.raises(SourceFailed, match="could not fetch openxlab"):
            openxlab.install_sdk(tmp_path / "sdk")
        monkeypatch.delenv("PIP_DEFAULT_TIMEOUT")
        openxlab.install_sdk(tmp_path / "sdk")
    assert (tmp_path / "sdk" / "openxlab" / "__init__.py").exists()
    assert len(commands) == 2 and all("pip" in command for command in commands)
    words = [word for command in commands for word in command]
    assert not [word for word in words if "timeout" in word.lower() or "retries" in word.lower()]


def test_of_two_that_need_it_at_once_one_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def run_pip(arguments: list[str], what: str, fix: str, **_: Any) -> None:
        ran.append(what)
        time.sleep(0.3)
        made = Path(arguments[arguments.index("--target") + 1])
        (made / "openxlab").mkdir(parents=True)
        (made / "openxlab" / "__init__.py").touch()

    monkeypatch.setattr(openxlab, "run_pip", run_pip)
    with ThreadPoolExecutor(4) as pool:
        for task in [pool.submit(openxlab.install_sdk, tmp_path / "sdk") for _ in range(4)]:
            task.result()
    assert ran == [openxlab.SDK]
