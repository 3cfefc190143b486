"""A Git LFS mirror over ssh: a real sshd, real git and git-lfs; no prompt, no hang, plain words."""

from __future__ import annotations

import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.settings import BadSetting, from_env
from serve.sources import git as running_git
from serve.sources.download import is_complete
from serve.sources.offer import SourceFailed, Unreachable
from tests.conftest import free_port
from tests.fake_git import FakeGit, serving_git
from tests.fake_ssh import SSHD, FakeSsh, serving_ssh
from tests.test_sources_lfs import FILES, WANTED, contents, get

pytestmark = [
    pytest.mark.skipif(SSHD is None, reason="sshd is not installed (apt install openssh-server)"),
    pytest.mark.skipif(shutil.which("git-lfs") is None, reason="git-lfs is not installed"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeSsh]:
    folder = tmp_path_factory.mktemp("ssh")
    with serving_git(FakeGit(folder / "git", dict(FILES))) as git:
        with serving_ssh(git, folder / "ssh") as running:
            yield running


@pytest.fixture
def ssh(server: FakeSsh, monkeypatch: pytest.MonkeyPatch) -> FakeSsh:
    monkeypatch.setenv("GIT_SSH_COMMAND", server.command)
    return server


def test_a_model_comes_over_ssh_whole(ssh: FakeSsh, tmp_path: Path) -> None:
    folder = get(ssh.url, tmp_path)
    assert contents(folder) == WANTED and is_complete(folder)
    asked = [shlex.split(line) for line in ssh.asked]
    assert ["git-upload-pack", "/model.git"] in asked
    assert asked[-1][0] == "git-lfs-authenticate" and asked[-1][2] == "download"


@pytest.mark.parametrize(
    ("key", "known", "reason", "fix"),
    [
        ("client", "nobody", "does not know the host 127.0.0.1", "ssh-keyscan -p {port} 127.0.0.1"),
        ("client", "changed", "another ssh key", "ssh-keygen -R [127.0.0.1]:{port}"),
        ("stranger", "known", "refuses this user's ssh key", "GIT_SSH_COMMAND"),
    ],
)
def test_what_ssh_does_not_trust_is_one_clear_error_at_once(
    ssh: FakeSsh,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    known: str,
    reason: str,
    fix: str,
) -> None:
    monkeypatch.setenv("GIT_SSH_COMMAND", ssh.client(key, known))
    before = time.monotonic()
    with pytest.raises(SourceFailed) as failed:
        get(ssh.url, tmp_path)
    assert reason in failed.value.reason and fix.format(port=ssh.port) in failed.value.fix
    assert time.monotonic() - before < 10 and not is_complete(tmp_path / "model")


def test_a_host_that_does_not_listen_or_does_not_speak_is_passed_over(
    ssh: FakeSsh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = ssh.url.replace(str(ssh.port), str(free_port()))
    with pytest.raises(Unreachable, match="127.0.0.1 cannot be reached"):
        get(closed, tmp_path)
    monkeypatch.setattr(running_git, "SILENT_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        silent = ssh.url.replace(str(ssh.port), str(mute.getsockname()[1]))
        with pytest.raises(Unreachable, match="does not answer"):
            get(silent, tmp_path)


def test_the_usual_way_to_write_an_ssh_address_is_answered_with_the_one_to_set() -> None:
    with pytest.raises(BadSetting, match="ssh://git@host/owner/name"):
        from_env({"OPENXLAB_MODEL_REPO_URL": "git@code.example:owner/name.git"})


def test_a_password_in_an_ssh_address_goes_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    run = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda a, **k: (seen.extend(a), run(a, **k))[1])
    with pytest.raises(Unreachable):
        get(f"ssh://git:s3cret@127.0.0.1:{free_port()}/model.git", tmp_path)
    assert "ssh://git@127.0.0.1" in " ".join(seen) and "s3cret" not in " ".join(seen)
    assert not (tmp_path / "clone" / ".credentials").exists()
