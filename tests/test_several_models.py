"""Several MODEL_IDS: held in memory at once where they fit, one in place of another where not."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader import Loader
from serve.quantization.machine import Machine
from serve.quantization.together import cache_bytes, has_room
from serve.settings import from_env
from tests.conftest import RunningApp, StartApp
from tests.tiny import tiny_gpt_oss, tiny_llama

GB = 10**9
ASK = {"max_tokens": 6, "temperature": 0, "messages": [{"role": "user", "content": "Hello"}]}
sizes = st.integers(0, 200 * GB)


@given(sizes, st.lists(sizes, min_size=1, max_size=5), st.sampled_from(["cpu", "cuda"]))
def test_weights_and_caches_of_all_stay_within_what_is_free(
    free: int, others: list[int], device: Any
) -> None:
    machine = Machine(device, free, "a machine")
    each = cache_bytes(machine, others)
    if each is not None:
        assert sum(others) + each * (len(others) + 1) <= free
        # Loaded one after the other, each still finds its room.
        left = free - each
        for needed in others:
            assert has_room(Machine(device, left, "a machine"), needed, each)
            left -= needed + each


def test_a_cache_of_a_set_size_is_not_made_smaller() -> None:
    machine = Machine("cuda", 40 * GB, "a GPU")
    assert cache_bytes(machine, [10 * GB], fixed=5 * GB) == 5 * GB
    assert cache_bytes(machine, [10 * GB], fixed=20 * GB) is None


def test_what_does_not_fit_together_is_held_one_at_a_time_and_the_log_has_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = tiny_llama(tmp_path / "one"), tiny_gpt_oss(tmp_path / "two")
    settings = from_env({"WORK_DIR": str(tmp_path), "MODEL_IDS": f"{one},{two}"})
    free = {"bytes": 1 * GB}
    monkeypatch.setattr("loader.this_machine", lambda: Machine("cpu", free["bytes"], "the CPU"))
    loader = Loader(settings, lambda _: None, lambda _: None)
    assert loader.offered() == ("one", "two")
    with caplog.at_level(logging.INFO):
        shared = loader.share_memory("one")
        assert shared is not None and shared == loader.cache_gb
        assert loader.has_room_beside("two") and not loader.has_room_beside("unknown")
        free["bytes"] = int(0.3 * GB)  # others took memory meanwhile
        assert not loader.has_room_beside("two")
        assert loader.share_memory("one") is None and not loader.has_room_beside("two")
    said = " ".join(record.message for record in caplog.records)
    assert "1.0 GB of memory are free; two would need 0.2 GB: all may be held at once" in said
    assert "0.3 GB are free: it is loaded in place of the others" in said
    assert "one model is held at a time" in said


def ask(app: RunningApp, model: str, **more: Any) -> Any:
    with app.client() as client:
        return client.post("/v1/chat/completions", json={**ASK, "model": model, **more})


def until_loaded(app: RunningApp, model: str) -> Any:
    limit = time.monotonic() + 60
    while (answer := ask(app, model)).status_code == 503 and time.monotonic() < limit:
        time.sleep(0.2)
    assert answer.status_code == 200, answer.text + app.log[-3000:]
    return answer


def test_a_model_that_fits_beside_the_first_is_loaded_once_and_both_answer_from_then_on(
    tmp_path: Path, start_app: StartApp
) -> None:
    one, two = tiny_llama(tmp_path / "one"), tiny_gpt_oss(tmp_path / "two")
    app = start_app(MODEL_IDS=f"{one},{two}", MODEL_SWITCH="all")
    ready = app.wait("/ready", 120).json()
    assert ready["model"]["id"] == "one" and ready["loaded"] == ["one"]
    assert ask(app, "two").status_code == 503
    assert ask(app, "one").status_code == 200, "the loaded one answers while another is loaded"
    assert until_loaded(app, "two").json()["model"] == "two"
    with ThreadPoolExecutor(6) as pool:
        asked = ["one", "two"] * 3
        answers = list(pool.map(lambda model: ask(app, model), asked))
    assert [a.json()["model"] for a in answers] == asked
    ready = app.wait("/ready", 5).json()
    assert sorted(ready["loaded"]) == ["one", "two"] and ready["model"]["id"] == "two"
    with app.client() as client:
        listed = client.get("/v1/models").json()["data"]
    assert {m["id"]: m["is_loaded"] for m in listed} == {"one": True, "two": True}
    assert "all may be held at once" in app.log and "it is loaded beside the others" in app.log


def test_a_model_that_does_not_fit_beside_the_first_takes_its_place(
    tmp_path: Path, start_app: StartApp
) -> None:
    one, two = tiny_llama(tmp_path / "one"), tiny_gpt_oss(tmp_path / "two")
    caches = "4000"  # GB for each model: more than there is
    app = start_app(MODEL_IDS=f"{one},{two}", MODEL_SWITCH="all", KV_CACHE_GB=caches)
    app.wait("/ready", 120)
    assert until_loaded(app, "two").json()["model"] == "two"
    assert app.wait("/ready", 5).json()["loaded"] == ["two"]
    assert "one model is held at a time" in app.log
    assert until_loaded(app, "one").json()["model"] == "one"
