"""What an engine says of the memory it found: a context that is cut, or one of no use."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import app
import loader
from serve.engine import runner
from serve.errors import OutOfMemory
from serve.settings import from_env
from tests.engine_models import engine_of, tiny
from tests.tiny import tiny_llama


def test_memory_for_a_handful_of_tokens_is_refused_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "_free_ram_bytes", lambda: 4 * 60_000)
    with pytest.raises(OutOfMemory, match=r"memory for \d+ tokens of context only.*MODEL_IDS"):
        engine_of(tiny("llama"), kv_cache_gb=None, context_length=100_000)


def test_a_small_cache_that_was_asked_for_serves_a_shorter_context_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    engine = engine_of(tiny("llama"), kv_cache_gb=0.00008, context_length=100_000)
    held = engine.context_length
    engine.close()
    assert held < 1000
    assert f"The model's context of 100000 tokens is cut to the {held} that fit" in caplog.text


def test_the_context_that_is_told_is_the_one_that_the_cache_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama(tmp_path / "tiny", max_position_embeddings=100_000)
    settings = from_env({"WORK_DIR": str(tmp_path), "MODEL_LOCAL_PATH": str(folder)})
    loaded = loader.load(settings, lambda _: None, print)
    monkeypatch.setattr(runner, "_free_ram_bytes", lambda: 4 * 600_000)
    served = app.assemble(loaded, settings)
    served.engine.close()
    assert 256 <= served.card.context_length < loaded.context_length
    assert served.card.context_length == served.engine.context_length


def test_8_bits_for_a_model_that_has_no_kernels_for_them_are_said_to_do_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine_of(tiny("gpt_oss"), dense_bits=8).close()
    assert "DENSE_BITS=8 has no effect" in caplog.text
