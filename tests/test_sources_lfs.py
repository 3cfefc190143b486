"""Git LFS: a real repository over HTTP, pointers first, objects resumed, passwords kept quiet."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from serve.settings import BadSetting, from_env
from serve.sources import download, lfs
from serve.sources import git as running_git
from serve.sources.candidates import candidates
from serve.sources.download import is_complete
from serve.sources.meter import Meter
from serve.sources.offer import SourceFailed, Unreachable, masked
from serve.values import Progress
from tests.fake_git import BACKEND, KINDS, FakeGit, serving_git

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
    with meter(told) as counting:
        offer, clone = lfs.offer(url, "gpt-oss-20b", folder / "clone", counting)
        counting.total_bytes = offer.total_bytes
        return lfs.fetch(offer, clone, folder / "model", counting)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def test_the_pointers_tell_sizes_before_any_object_comes(git: FakeGit, tmp_path: Path) -> None:
    offer, clone = lfs.offer(git.url, "gpt-oss-20b", tmp_path / "clone", meter([]))
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
    assert failed.value.reason == "127.0.0.1 is not serving now" and failed.value.fix
    assert not is_complete(tmp_path / "model")
    git.faults.clear()
    assert contents(get(git.url, tmp_path)) == WANTED


def test_a_half_done_clone_and_a_stale_lock_do_not_stop_the_next_try(
    git: FakeGit, tmp_path: Path
) -> None:
    lfs.offer(git.url, "gpt-oss-20b", tmp_path / "clone", meter([]))
    (tmp_path / "clone" / ".git" / "index.lock").write_text("")
    (tmp_path / "clone" / "gpt-oss-20b" / "config.json").unlink()
    assert contents(get(git.url, tmp_path)) == WANTED


def test_what_came_before_a_kill_counts_as_there_when_the_disk_is_nearly_full(
    git: FakeGit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lfs, "ATTEMPTS", 1)
    git.faults = deque(["", *["503"] * 50])
    with pytest.raises(SourceFailed):
        get(git.url, tmp_path)
    git.faults.clear()
    free = 64 * 2**20 + 350_000  # one of the two files is there, the other has room
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    assert contents(get(git.url, tmp_path)) == WANTED


def test_a_server_that_falls_silent_is_left_with_everything_that_git_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_git, "SILENT_SECONDS", 0.5)
    before = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/model.git"
        with pytest.raises(Unreachable, match="127.0.0.1 does not answer"):
            get(url, tmp_path)
        mute.accept()[0].close()
    assert time.monotonic() - before < 10
    mine = psutil.Process().children(recursive=True)
    assert not [child for child in mine if "git" in child.name()]


def test_a_full_disk_is_told_in_words(git: FakeGit, tmp_path: Path) -> None:
    _, clone = lfs.offer(git.url, "gpt-oss-20b", tmp_path / "clone", meter([]))
    told = running_git.failure("LFS: write /x: No space left on device\n", clone)
    assert told.reason == "the disk is full" and "WORK_DIR" in told.fix


@pytest.mark.parametrize("secret", ["to/ken", "p@ss", "plain"])
def test_no_way_to_write_a_password_is_ever_shown(secret: str) -> None:
    assert secret not in masked(f"fatal: unable to access 'https://user:{secret}@host/x.git/'")
    address = f"https://user:{secret}@host/owner/name.git"
    try:
        named = from_env({"OPENXLAB_MODEL_REPO_URL": address, "WORK_DIR": "/tmp"})
    except BadSetting as bad:
        assert secret not in str(bad) and "%2F" in str(bad)
    else:
        assert all(secret not in candidate.name for candidate in candidates(named))


def test_a_password_works_and_is_nowhere_to_be_seen(
    git: FakeGit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git.password = "s3cret-token"
    with_password = git.url.replace("//", f"//user:{git.password}@")
    seen: list[str] = []
    run = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda a, **k: (seen.extend(a), run(a, **k))[1])
    offer, clone = lfs.offer(with_password, "gpt-oss-20b", tmp_path / "clone", meter([]))
    assert git.password not in " ".join(seen) + offer.reference + repr(offer) + repr(clone)
    assert (clone.folder / ".credentials").stat().st_mode & 0o077 == 0
    with meter([]) as counting:
        assert contents(lfs.fetch(offer, clone, tmp_path / "model", counting)) == WANTED


def test_a_wrong_password_is_told_without_it(git: FakeGit, tmp_path: Path) -> None:
    git.password = "right"
    url = git.url.replace("//", "//user:wr0ng-token@")
    with pytest.raises(SourceFailed) as failed:
        lfs.offer(url, "", tmp_path / "clone", meter([]))
    assert "wr0ng-token" not in failed.value.reason + failed.value.fix
    assert "password" in failed.value.reason


@pytest.mark.parametrize(
    ("path", "subfolder", "said"),
    [("/nothing.git", "", "no such repository"), ("/model.git", "no-such", "no folder")],
)
def test_what_is_not_there_is_told(
    git: FakeGit, tmp_path: Path, path: str, subfolder: str, said: str
) -> None:
    with pytest.raises(SourceFailed, match=said) as failed:
        lfs.offer(git.base + path, subfolder, tmp_path / "clone", meter([]))
    assert failed.value.fix


def test_without_git_lfs_the_fix_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lfs.shutil, "which", lambda name: None if name == "git-lfs" else name)
    with pytest.raises(SourceFailed, match="git-lfs is not installed") as failed:
        lfs.offer("https://example.org/x.git", "", tmp_path / "clone", meter([]))
    assert "apt install" in failed.value.fix


def test_a_users_language_and_ways_to_be_asked_change_nothing(
    git: FakeGit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """git's words are read, so they must be English; nobody is there to answer a question."""
    asked = tmp_path / "asked"
    script = tmp_path / "ask"
    script.write_text(f"#!/bin/sh\ntouch {asked}\necho secret\n")
    script.chmod(0o755)
    for name in ("GIT_ASKPASS", "SSH_ASKPASS"):
        monkeypatch.setenv(name, str(script))
    monkeypatch.setenv("DISPLAY", ":0")
    for name in ("LANG", "LC_ALL", "LC_MESSAGES"):
        monkeypatch.setenv(name, "de_DE.UTF-8")
    monkeypatch.setenv("LANGUAGE", "de_DE:de")
    git.password = "right"
    with pytest.raises(SourceFailed, match="asks for a user and a password"):
        get(git.url, tmp_path / "closed")
    assert not asked.exists()
    elsewhere = running_git.Clone(tmp_path / "nowhere", git.url)
    said = subprocess.run(elsewhere.git("status"), capture_output=True, text=True).stderr
    assert said.startswith("fatal: cannot change to"), said
    git.password = ""
    assert contents(get(git.url, tmp_path / "open")) == WANTED


def test_git_may_be_slow_for_as_long_as_it_says_something(tmp_path: Path) -> None:
    log = tmp_path / "log"
    slow = ["sh", "-c", "for i in 1 2 3 4 5 6; do echo $i; sleep 0.2; done"]
    code, said = running_git.run_watched(slow, log, lambda: len(log.read_bytes()), 0.6)
    assert (code, said.split()) == (0, ["1", "2", "3", "4", "5", "6"])
    silent = ["sh", "-c", "echo 1; sleep 30"]
    code, said = running_git.run_watched(silent, log, lambda: len(log.read_bytes()), 0.6)
    assert code != 0 and "nothing came for" in said


@pytest.mark.slow
def test_200_random_fault_schedules_end_with_the_right_bytes_or_a_clear_error(
    git: FakeGit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lfs, "ATTEMPTS", 2)
    monkeypatch.setattr(lfs, "SILENT_SECONDS", 1.0)  # git-lfs follows a redirect loop for ever
    good = [run_schedule(number, git, tmp_path / str(number)) for number in range(200)]
    assert any(good) and not all(good)


def run_schedule(number: int, git: FakeGit, folder: Path) -> bool:
    """True when it ended with the right bytes."""
    drawn = random.Random(number)
    kinds = drawn.sample(KINDS, drawn.randint(1, len(KINDS)))
    git.faults = deque(drawn.choice(kinds) for _ in range(drawn.choice((0, 2, 5, 12, 60))))
    try:
        got = get(git.url, folder)
    except SourceFailed as failure:
        assert failure.reason and failure.fix and not is_complete(folder / "model"), number
        whole = contents(folder / "model") if (folder / "model").exists() else {}
        assert whole.items() <= WANTED.items(), f"schedule {number}: a wrong file has its name"
        git.faults.clear()
        assert contents(get(git.url, folder)) == WANTED, f"schedule {number}: not mended"
        return False
    assert contents(got) == WANTED, f"schedule {number}"
    return True
