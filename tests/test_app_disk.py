"""The app on a disk that fills, and killed amid a download: what a user sees, and that the next
start goes on where it was."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests import fake_hub
from tests.conftest import RunningApp, StartApp
from tests.fake_hub import FakeHub, Fault, repository_of, serving
from tests.tiny import tiny_llama

pytestmark = pytest.mark.slow
ASK = {"model": "default", "max_tokens": 4, "messages": [{"role": "user", "content": "Hello"}]}


class HalfwayHub(FakeHub):
    """Holds back the second half of the first answer with weights until it is let go."""

    def __init__(self, files: dict[str, dict[str, bytes]]) -> None:
        super().__init__(files, stall_seconds=300)
        self.starts: list[int] = []
        self.let_go = threading.Event()

    def held_back(self, content: bytes, start: int, fault: Fault | None) -> Fault | None:
        if len(content) < 10**6:
            return fault
        self.starts.append(start)
        return Fault("stall", 0.5) if len(self.starts) == 1 else fault


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HalfwayHub]:
    model = tiny_llama(
        tmp_path / "model", hidden_size=512, intermediate_size=1024, num_hidden_layers=3
    )
    halfway = HalfwayHub({"o/model": repository_of(model)})
    send = fake_hub._Handler._send_part

    def held(self: Any, content: bytes, start: int, fault: Fault | None) -> None:
        send(self, content, start, halfway.held_back(content, start, fault))

    monkeypatch.setattr(fake_hub._Handler, "_send_part", held)
    monkeypatch.setattr(fake_hub, "time", SimpleNamespace(sleep=halfway.let_go.wait))
    with serving(halfway):
        yield halfway
        halfway.let_go.set()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 100 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(place)], capture_output=True
    )
    if made.returncode != 0:
        pytest.skip("only root may mount a disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def environment(hub: FakeHub, place: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.base,
        "MODEL_IDS": "o/model",
        "HF_MODEL_ID": "no/such",
        "WORK_DIR": str(place),
        "PIP_INDEX_URL": "http://127.0.0.1:9",
        "PIP_RETRIES": "0",
    }


def told(app: RunningApp, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What /ready says once it is what is wanted."""
    limit, said = time.monotonic() + 120, None
    while time.monotonic() < limit and app.process.poll() is None:
        try:
            said = httpx.get(f"{app.base}/ready", timeout=10).json()
        except httpx.TransportError:
            said = None
        if said is not None and wanted(said):
            return said
        time.sleep(0.1)
    raise AssertionError(f"{said}\n{app.log[-4000:]}")


def is_halfway(said: dict[str, Any]) -> bool:
    return bool((said["progress"]["done_bytes"] or 0) > 10**7)


def has_ended(said: dict[str, Any]) -> bool:
    return said["status"] in ("ready", "failed")


def fill(place: Path, leave: int = 0) -> Path:
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (2**16, 1):
            try:
                while shutil.disk_usage(place).free > leave:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


def test_a_disk_that_fills_is_told_and_the_next_start_resumes(
    hub: HalfwayHub, disk: Path, start_app: StartApp
) -> None:
    first = start_app(**environment(hub, disk))
    told(first, is_halfway)
    filler = fill(disk, leave=2**20)
    hub.let_go.set()
    said = told(first, has_ended)
    assert said["status"] == "failed"
    assert said["passed_over"][0]["reason"] == "the disk is full"
    with first.client() as client:
        answer = client.post("/v1/chat/completions", json=ASK)
    assert answer.status_code == 503 and "/ready" in answer.json()["error"]["message"]
    assert "Traceback" not in first.log
    first.stop()

    filler.unlink()
    second = start_app(**environment(hub, disk))
    assert told(second, has_ended)["model"]["id"] == "o/model", second.log
    assert hub.starts[0] == 0 and hub.starts[-1] > 14 * 10**6
    with second.client() as client:
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200
        fill(disk)
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200
        stored = client.post("/v1/responses", json={"model": "default", "input": "Hello"})
    assert stored.status_code == 200 and stored.json()["store"] is False
    second.stop()
    third = start_app(**environment(hub, disk))
    assert told(third, has_ended)["model"]["id"] == "o/model", third.log


def test_a_disk_that_is_full_from_the_beginning_is_one_line(
    hub: HalfwayHub, disk: Path, start_app: StartApp
) -> None:
    fill(disk)
    app = start_app(**environment(hub, disk))
    assert app.process.wait(60) == 2
    lines = app.log.strip().splitlines()
    assert len(lines) == 1 and f"WORK_DIR={disk}" in lines[0] and "Free disk space" in lines[0]


def test_a_process_killed_amid_a_download_is_gone_on_from(
    hub: HalfwayHub, tmp_path: Path, start_app: StartApp
) -> None:
    place = tmp_path / "work"
    killed = start_app(**environment(hub, place))
    told(killed, is_halfway)
    killed.process.kill()
    killed.process.wait(10)
    again = start_app(**environment(hub, place))
    assert told(again, has_ended)["model"]["id"] == "o/model", again.log
    assert hub.starts[0] == 0 and hub.starts[1] > 14 * 10**6 and len(hub.starts) == 2
    with again.client() as client:
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200
