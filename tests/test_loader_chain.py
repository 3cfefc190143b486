"""From a setting to an answer, through every source, with hubs on 127.0.0.1 that misbehave."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from loader import Loader, LoadFailed
from serve.model import LoadedModel
from serve.quantization.machine import Machine
from serve.settings import Settings, from_env
from serve.values import PassedOver, Progress
from tests.fake_git import FakeGit, serving_git
from tests.fake_hub import FakeHub, repository_of, schedule, serving
from tests.openxlab_sdk import openxlab_sdk  # noqa: F401
from tests.tiny import tiny_gpt_oss, tiny_llama

DEAD = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("models")
    oss = repository_of(tiny_gpt_oss(folder / "oss", mxfp4=True))
    return {"o/tiny-oss": oss, "o/tiny-llama": repository_of(tiny_llama(folder / "llama"))}


@pytest.fixture
def hub(models: dict[str, dict[str, bytes]]) -> Iterator[FakeHub]:
    with serving(FakeHub(dict(models))) as running:
        yield running


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No last resort, and no user's caches."""
    monkeypatch.setattr("serve.sources.embedded.REQUIREMENT", "no-such-package-here==0.0.0")
    monkeypatch.setenv("PIP_INDEX_URL", DEAD)
    monkeypatch.setenv("PIP_RETRIES", "0")
    for source in ("huggingface", "modelscope"):
        monkeypatch.setattr(f"serve.sources.{source}.cached", lambda reference: None)


class Road:
    def __init__(self, folder: Path, **environment: str) -> None:
        silent = {"HF_ENDPOINT": DEAD, "MODELSCOPE_ENDPOINT": DEAD, "OPENXLAB_ENDPOINT": DEAD}
        self.settings: Settings = from_env({"WORK_DIR": str(folder), **silent, **environment})
        self.progress: list[Progress] = []
        self.passed: list[PassedOver] = []
        self.loader = Loader(self.settings, self.progress.append, self.passed.append)

    def load(self) -> LoadedModel:
        return self.loader.load()


def answers(loaded: LoadedModel) -> None:
    talk = [{"role": "user", "content": "Hello"}]
    ids = loaded.tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        assert loaded.model(torch.tensor([ids])).logits.isfinite().all()


@pytest.mark.parametrize("hub_name", ["HF_ENDPOINT", "MODELSCOPE_ENDPOINT"])
def test_model_ids_reach_an_answer_from_either_hub_whatever_the_other_does(
    hub: FakeHub, tmp_path: Path, hub_name: str
) -> None:
    hub.faults = schedule([("slow", 0), ("cut", 0.5), ("503", 0), ("chunked-cut", 0.2)])
    road = Road(tmp_path, MODEL_IDS="no/such, o/tiny-oss", **{hub_name: hub.base})
    loaded = road.load()
    answers(loaded)
    assert loaded.id == "o/tiny-oss" and loaded.context_length == 1024
    assert [p.candidate.split()[0] for p in road.passed].count("no/such") == 2
    downloads = [p for p in road.progress if p.phase == "downloading"]
    assert downloads[-1].done_bytes == downloads[-1].total_bytes
    assert downloads[-1].source in ("ModelScope", "Hugging Face")


def test_the_next_start_needs_no_hub(hub: FakeHub, tmp_path: Path) -> None:
    Road(tmp_path, MODEL_IDS="o/tiny-llama", HF_ENDPOINT=hub.base).load()
    again = Road(tmp_path, MODEL_IDS="o/tiny-llama").load()
    answers(again)
    assert "fetched earlier" in again.source


def test_a_hubs_own_cache_is_used_when_whole_and_ignored_when_not(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tiny_llama(tmp_path / "cache")
    monkeypatch.setattr("serve.sources.huggingface.cached", lambda reference: cache)
    named = {"MODEL_IDS": "o/tiny-llama", "HF_ENDPOINT": hub.base}
    assert Road(tmp_path, **named).load().folder == cache
    weights = cache / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    loaded = Road(tmp_path, **named).load()
    assert loaded.source == "Hugging Face" and loaded.folder != cache


def test_hub_order_is_obeyed(hub: FakeHub, tmp_path: Path) -> None:
    both = {"HF_ENDPOINT": hub.base, "MODELSCOPE_ENDPOINT": hub.base, "MODEL_IDS": "o/tiny-llama"}
    first = Road(tmp_path / "1", HUB_ORDER="modelscope,huggingface", **both).load()
    second = Road(tmp_path / "2", HUB_ORDER="huggingface,modelscope", **both).load()
    assert (first.source, second.source) == ("ModelScope", "Hugging Face")


def test_what_does_not_fit_is_passed_over_before_its_download(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loader.this_machine", lambda: Machine("cpu", 210 * 2**20, "the CPU"))
    monkeypatch.setitem(hub.files["o/tiny-oss"], "model.safetensors", bytes(90_000_000))
    road = Road(tmp_path, MODEL_IDS="o/tiny-oss,o/tiny-llama", HF_ENDPOINT=hub.base)
    assert road.load().id == "o/tiny-llama"
    reason = next(p.reason for p in road.passed if "tiny-oss from Hugging" in p.candidate)
    assert "GB of memory" in reason and "are free" in reason
    assert "model.safetensors" in hub.bytes_requests()  # the llama's, once
    assert hub.bytes_requests().count("model.safetensors") == 1


def test_all_hubs_silent_cost_little(tmp_path: Path) -> None:
    """An address that swallows packets (TEST-NET-1) is worse than one that refuses."""
    silent = "http://192.0.2.1"
    road = Road(tmp_path, MODEL_IDS="a/b,c/d,e/f", HF_ENDPOINT=silent, MODELSCOPE_ENDPOINT=silent)
    before = time.monotonic()
    with pytest.raises(LoadFailed):
        road.load()
    assert time.monotonic() - before < 15
    assert all("cannot be reached" in p.reason for p in road.passed if " from " in p.candidate)


def test_models_that_fit_are_offered_and_one_can_be_switched_to(
    hub: FakeHub, tmp_path: Path
) -> None:
    local = tiny_llama(tmp_path / "my-own")
    seeing = Path(__file__).parent / "models" / "tiny_vlm"
    wanted = f"o/tiny-llama,no/such,{local},o/tiny-oss,openai/gpt-oss-120b,{seeing}"
    road = Road(tmp_path, MODEL_IDS=wanted, HF_ENDPOINT=hub.base)
    assert road.load().id == "o/tiny-llama"
    fetched = len(hub.bytes_requests())
    assert road.loader.offered() == ("o/tiny-llama", "my-own", "o/tiny-oss", "tiny_vlm")
    assert road.loader.seeing() == ("tiny_vlm",)
    assert hub.bytes_requests()[fetched:] == ["config.json"]  # offering downloads no weights
    answers(road.loader.load_offered("my-own"))
    answers(road.loader.load_offered("o/tiny-oss"))
    with pytest.raises(LoadFailed, match="not offered"):
        road.loader.load_offered("openai/gpt-oss-120b")


@pytest.mark.skipif(shutil.which("git-lfs") is None, reason="git-lfs is not installed")
def test_a_git_lfs_mirror_with_a_subfolder_loads_and_two_at_once_fetch_it_once(
    models: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    files = {f"tiny/{name}": content for name, content in models["o/tiny-oss"].items()}
    with serving_git(FakeGit(tmp_path / "git", files)) as git, ThreadPoolExecutor(2) as pool:
        named = {"OPENXLAB_MODEL_REPO_URL": "https://x/o/n.git", "OPENXLAB_MODEL_SUBDIR": "tiny"}
        roads = [Road(tmp_path, **named) for _ in range(2)]
        for road in roads:
            object.__setattr__(road.settings, "openxlab_model_repo_url", git.url)
        found = list(pool.map(Road.load, roads))
        assert len(git.served) == 1
    answers(found[0])
    assert {(one.id, one.source) for one in found} == {("model/tiny", "Git LFS")}
    assert not list((tmp_path / "gpt_oss_app_runtime" / "models").glob("*.clone*"))


@pytest.mark.real
def test_openxlab_loads_and_its_failure_leads_to_the_next_source(
    hub: FakeHub,
    tmp_path: Path,
    openxlab_sdk: Path,  # noqa: F811
) -> None:
    shutil.copytree(openxlab_sdk, tmp_path / "gpt_oss_app_runtime" / "openxlab_sdk")
    named = {"OPENXLAB_MODEL_REPO": "o/tiny-llama", "OPENXLAB_ENDPOINT": hub.base}
    hub.listing_faults = deque(["503"])
    road = Road(tmp_path, **named, MODEL_IDS="o/tiny-llama", MODELSCOPE_ENDPOINT=hub.base)
    assert road.load().source == "ModelScope"
    assert "503" in road.passed[0].reason
    shutil.rmtree(tmp_path / "gpt_oss_app_runtime" / "models")
    loaded = Road(tmp_path, **named).load()
    answers(loaded)
    assert loaded.source == "OpenXLab"
