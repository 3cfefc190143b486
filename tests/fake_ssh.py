"""Debian's own sshd on a port of 127.0.0.1, in front of a FakeGit: git over ssh, and Git LFS as
real hosts do it, with a `git-lfs-authenticate` that sends the client to the LFS server."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import free_port
from tests.fake_git import FakeGit

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
PRIVATE_FOLDER = Path("/run/sshd")  # an sshd of root's wants it; Debian's service makes it
HOST = """\
printf '%s\\n' "$SSH_ORIGINAL_COMMAND" >> {log}
eval "set -- $SSH_ORIGINAL_COMMAND"
case $1 in
git-upload-pack) exec git -c safe.directory=* upload-pack {root}"$2" ;;
git-lfs-authenticate) printf '%s' {answer} ;;
*) echo "sh: 1: $1: not found" >&2; exit 127 ;;
esac
"""


@dataclass(frozen=True)
class FakeSsh:
    """`command` is a GIT_SSH_COMMAND whose user knows the host and has a key that it takes."""

    folder: Path
    port: int
    git: FakeGit

    @property
    def url(self) -> str:
        return f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}/model.git"

    @property
    def command(self) -> str:
        return self.client("client", "known")

    def client(self, key: str, known: str) -> str:
        """ssh without this machine's own settings, with a key and a list of known hosts."""
        options = ["-F", "none", "-i", str(self.folder / key), "-oIdentitiesOnly=yes"]
        options += [f"-oUserKnownHostsFile={self.folder / known}"]
        return shlex.join(["ssh", *options, "-oGlobalKnownHostsFile=none"])

    @property
    def asked(self) -> list[str]:
        """The commands that clients have run, oldest first."""
        log = self.folder / "asked"
        return log.read_text().splitlines() if log.exists() else []


@contextmanager
def serving_ssh(git: FakeGit, folder: Path) -> Iterator[FakeSsh]:
    """`git` is being served over HTTP already: its objects are fetched there."""
    assert SSHD is not None
    folder.mkdir(mode=0o700)
    fake = FakeSsh(folder, free_port(), git)
    for key in ("host", "other-host", "client", "stranger"):
        made = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(folder / key)]
        subprocess.run(made, check=True)
    _write_files(fake)
    if os.geteuid() == 0:
        PRIVATE_FOLDER.mkdir(mode=0o755, exist_ok=True)
    with (folder / "sshd.log").open("wb") as log:
        process = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "config")], stderr=log)
    try:
        _wait_for(fake, process)
        yield fake
    finally:
        process.terminate()
        process.wait()


def _write_files(fake: FakeSsh) -> None:
    folder, host = fake.folder, fake.folder / "host.sh"
    answer = json.dumps({"href": f"{fake.git.url}/info/lfs", "header": {}, "expires_in": 600})
    words = {"log": folder / "asked", "root": fake.git.root, "answer": answer}
    host.write_text(HOST.format(**{name: shlex.quote(str(word)) for name, word in words.items()}))
    runs = shlex.join(["/bin/sh", str(host)])
    public = (folder / "client.pub").read_text()
    (folder / "authorized").write_text(f'command="{runs}",restrict {public}')
    for known, key in (("known", "host"), ("changed", "other-host")):
        line = (folder / f"{key}.pub").read_text()
        (folder / known).write_text(f"[127.0.0.1]:{fake.port} {line}")
    (folder / "config").write_text(
        f"ListenAddress 127.0.0.1\nPort {fake.port}\nHostKey {folder / 'host'}\n"
        f"AuthorizedKeysFile {folder / 'authorized'}\nPidFile none\nStrictModes no\nUsePAM no\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
        "KexAlgorithms curve25519-sha256\n"  # the usual one takes three times as long
    )


def _wait_for(fake: FakeSsh, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", fake.port), 1):
            return
        time.sleep(0.02)
    raise AssertionError(f"sshd did not start:\n{(fake.folder / 'sshd.log').read_text()}")
