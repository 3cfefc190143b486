"""Git LFS: a real repository over HTTP, pointers first, objects resumed, passwords kept quiet."""

from __future__ import annotations

import random
import shutil
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.sources import lfs
from serve.sources.download import is_complete
from serve.sources.meter import Meter
from serve.sources.offer import SourceFailed
from serve.values import Progress
from tests.fake_git import BACKEND, FakeGit, serving_git

pytestmark = pytest.mark.skipif(
    shutil.which("git-lfs") is None or not Path(BACKEND).exists(), reason="git-lfs is not installed"
)

WEIGHTS = random.Random(2).randbytes(300_000)
FILES = {
    "README.md": b"read me",
    "gpt-oss-20b/config.json": b'{"model_type": "llama"}',
    "gpt-oss-20b/model-00001-of-00002.safetensors": WEIGHTS,
    "gpt-oss-20b/model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "gpt-oss-20b/model.safetensors.index.json": b"{}",
    "gpt-oss-20b/original/model.safetensors": b"never fetched",
    "other/model.safetensors": b"never fetched either",
}
WANTED = {
    name.split("/")[1]: content
    for name, content in FILES.items()
    if name.startswith("gpt-oss-20b/") and "original" not in name
}


@pytest.fixture
def git(tmp_path: Path) -> Iterator[FakeGit]:
    with serving_git(FakeGit(tmp_path / "server", dict(FILES))) as running:
        yield running


def meter(heard: list[Progress]) -> Meter:
    return Meter(heard.append, "a model", lfs.NAME)


def get(url: str, folder: Path, heard: list[Progress] | None = None) -> Path:
    told = heard if heard is not None else []
    offer, clone = lfs.offer(url, "gpt-oss-20b", folder / "clone")
    with meter(told) as counting:
        counting.total_bytes = offer.total_bytes
        return lfs.fetch(offer, clone, folder / "model", counting)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def test_the_pointers_tell_sizes_before_any_object_comes(git: FakeGit, tmp_path: Path) -> None:
    offer, clone = lfs.offer(git.url, "gpt-oss-20b", tmp_path / "clone")
    assert {f.path: f.size for f in offer.files} == {k: len(v) for k, v in WANTED.items()}
    assert offer.weight_bytes == 600_000 and git.served == []
    assert (clone.folder / "gpt-oss-20b" / "config.json").read_bytes() == WANTED["config.json"]


def test_only_the_wanted_objects_come_and_the_disk_holds_them_once(
    git: FakeGit, tmp_path: Path
) -> None:
    heard: list[Progress] = []
    folder = get(git.url, tmp_path, heard)
    assert contents(folder) == WANTED and is_complete(folder)
    assert len(git.served) == 2 and not (tmp_path / "clone").exists()
    assert heard[-1].done_bytes is not None and heard[-1].done_bytes >= 600_000


@pytest.mark.parametrize("fault", ["cut", "503", "garbage"])
def test_objects_that_break_are_fetched_again(git: FakeGit, tmp_path: Path, fault: str) -> None:
    git.faults = deque([fault] * 2)
    assert contents(get(git.url, tmp_path)) == WANTED


def test_a_repository_that_never_gives_its_objects_is_one_clear_error_and_resumes(
    git: FakeGit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lfs, "ATTEMPTS", 2)
    git.faults = deque(["503"] * 1000)
    with pytest.raises(SourceFailed) as failed:
        get(git.url, tmp_path)
    assert "git could not get the repository" in failed.value.reason
    assert not is_complete(tmp_path / "model")
    git.faults.clear()
    assert contents(get(git.url, tmp_path)) == WANTED


def test_a_half_done_clone_and_a_stale_lock_do_not_stop_the_next_try(
    git: FakeGit, tmp_path: Path
) -> None:
    lfs.offer(git.url, "gpt-oss-20b", tmp_path / "clone")
    (tmp_path / "clone" / ".git" / "index.lock").write_text("")
    (tmp_path / "clone" / "gpt-oss-20b" / "config.json").unlink()
    assert contents(get(git.url, tmp_path)) == WANTED


def test_a_password_works_and_is_nowhere_to_be_seen(
    git: FakeGit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git.password = "s3cret-token"
    with_password = git.url.replace("//", f"//user:{git.password}@")
    seen: list[str] = []
    run = lfs.subprocess.run
    monkeypatch.setattr(lfs.subprocess, "run", lambda a, **k: (seen.extend(a), run(a, **k))[1])
    offer, clone = lfs.offer(with_password, "gpt-oss-20b", tmp_path / "clone")
    assert git.password not in " ".join(seen) + offer.reference + repr(offer) + repr(clone)
    assert (clone.folder / ".credentials").stat().st_mode & 0o077 == 0
    with meter([]) as counting:
        assert contents(lfs.fetch(offer, clone, tmp_path / "model", counting)) == WANTED


def test_a_wrong_password_is_told_without_it(git: FakeGit, tmp_path: Path) -> None:
    git.password = "right"
    url = git.url.replace("//", "//user:wr0ng-token@")
    with pytest.raises(SourceFailed) as failed:
        lfs.offer(url, "", tmp_path / "clone")
    assert "wr0ng-token" not in failed.value.reason + failed.value.fix
    assert "password" in failed.value.reason


@pytest.mark.parametrize(
    ("path", "subfolder", "said"),
    [("/nothing.git", "", "git could not get"), ("/model.git", "no-such", "no folder")],
)
def test_what_is_not_there_is_told(
    git: FakeGit, tmp_path: Path, path: str, subfolder: str, said: str
) -> None:
    with pytest.raises(SourceFailed, match=said) as failed:
        lfs.offer(git.base + path, subfolder, tmp_path / "clone")
    assert failed.value.fix


def test_without_git_lfs_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfs.shutil, "which", lambda name: None if name == "git-lfs" else name)
    with pytest.raises(SourceFailed, match="git-lfs is not installed") as failed:
        lfs.offer("https://example.org/x.git", "", tmp_path / "clone")
    assert "apt install" in failed.value.fix
