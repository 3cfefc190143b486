"""Shared by the tests that start the real process: a cache for the embedded model, a way to run
the app."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parent.parent
KEY = "test-key-not-secret"


@dataclass(frozen=True)
class RunningApp:
    """One `python app.py` on 127.0.0.1; `log` is what it has printed so far."""

    process: subprocess.Popen[bytes]
    port: int
    log_file: Path

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def client(self, key: str | None = KEY, timeout: float = 120) -> httpx.Client:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.base, headers=headers, timeout=timeout)

    def wait(self, path: str, seconds: float) -> httpx.Response:
        """Until `path` answers 200. A process that ended or took longer fails the test with its
        log."""
        limit = time.monotonic() + seconds
        with self.client() as client:
            while time.monotonic() < limit and self.process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    answer = client.get(path)
                    if answer.status_code == 200:
                        return answer
                time.sleep(0.1)
        raise AssertionError(f"{path} did not answer 200 within {seconds} s:\n{self.log[-6000:]}")

    def stop(self, seconds: float = 20) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


StartApp = Callable[..., RunningApp]


def start(folder: Path, **environment: str) -> RunningApp:
    port = free_port()
    log_file = folder / f"app-{port}.log"
    settings = {
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "APP_API_KEY": KEY,
        "WORK_DIR": str(folder),
        # Hubs that refuse: the tests meet no network but the package registry.
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9",
        "OMP_NUM_THREADS": "2",
        **environment,
    }
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=ROOT,
            env={**os.environ, **settings},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return RunningApp(process, port, log_file)


@pytest.fixture
def start_app(tmp_path: Path) -> Iterator[StartApp]:
    """Starts apps for one test (keyword arguments are environment variables) and ends them after
    it."""
    apps: list[RunningApp] = []

    def starter(**environment: str) -> RunningApp:
        apps.append(start(tmp_path, **environment))
        return apps[-1]

    yield starter
    for app in apps:
        with contextlib.suppress(subprocess.TimeoutExpired):
            app.stop()
        if app.process.poll() is None:
            app.process.kill()


@pytest.fixture(scope="session")
def embedded_app() -> Iterator[RunningApp]:
    """The app as a new user gets it: no model setting. Its download is kept between test runs."""
    folder = ROOT / ".test-cache"
    folder.mkdir(exist_ok=True)
    app = start(folder)
    try:
        app.wait("/ready", 240)
        yield app
    finally:
        app.stop()


LONGEST_FIRST = (
    "test_app.py",
    "test_ui_browser.py",
    "test_vision_",
    "test_ui_accessibility.py",
    "test_ui_models.py",
    "test_quantization.py",
    "test_ui_api_panel.py",
    "test_ui_early.py",
    "test_app_zerogpu.py",
    "test_each_setting.py",
    "test_several_models.py",
    "test_clients_node.py",
    "test_sources_openxlab.py",
    "test_engine_decoder.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A browser on a machine of two busy cores may miss a time limit: it gets another try. What is
    wrong with the page fails every time. Files that take minutes come first: the workers, each of
    which runs whole files, then end together."""
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.flaky(reruns=2))
    items.sort(key=lambda item: not item.path.name.startswith(LONGEST_FIRST))
