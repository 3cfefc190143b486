"""git and git-lfs as subprocesses: argument lists, no shell, no prompts, an end to every silence.

What they say is turned into one plain sentence and what to set; a run that says and brings nothing
for a while is ended with all the processes that it started. Knows no model. Used by lfs.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from serve.sources.meter import Meter
from serve.sources.offer import SourceFailed, Unreachable, masked

SILENT_SECONDS = 10.0  # without a word of git's progress
LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Clone:
    """A clone that holds pointers; `url` has no password in it."""

    folder: Path
    url: str

    @property
    def credentials(self) -> Path:
        return self.folder / ".credentials"

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    def git(self, *arguments: str) -> list[str]:
        environment = {
            "LC_ALL": "C.UTF-8",  # its words are read below
            "LANGUAGE": "",  # wins over LC_ALL, which is not plain C
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ASKPASS": "true",  # an editor's terminal sets one that opens a window
            "SSH_ASKPASS_REQUIRE": "never",
            "GIT_LFS_SKIP_SMUDGE": "1",
        }
        options = (
            "credential.helper=",  # none of the machine's, but this one
            f"credential.helper=store --file={self.credentials}",
            # GIT_SSH_COMMAND, where its user sets it, wins over this.
            "core.sshCommand=ssh -oBatchMode=yes -oConnectTimeout=5 -oServerAliveInterval=5",
            "http.lowSpeedLimit=1",
            "http.lowSpeedTime=10",
            "lfs.dialtimeout=5",
            "lfs.tlstimeout=10",
            "lfs.activitytimeout=10",
            "lfs.ssh.retries=1",
            "lfs.transfer.maxretries=1",  # lfs.py tries again, and tells how it goes
            "lfs.transfer.maxretrydelay=1",
            "protocol.file.allow=never",
            "protocol.ext.allow=never",
        )
        return [
            "env",
            *(f"{name}={value}" for name, value in environment.items()),
            *("git", "-C", str(self.folder)),
            *(word for option in options for word in ("-c", option)),
            *arguments,
        ]


def ask(clone: Clone, meter: Meter, *arguments: str) -> None:
    """One command of git in the clone. Raises SourceFailed."""

    def said_so_far() -> int:
        text = clone.log.read_bytes()
        last = text.replace(b"\r", b"\n").strip().rsplit(b"\n", 1)[-1]
        meter.detail = f"git: {masked(last.decode(errors='replace'))[:100]}" if last else "git"
        return len(text)

    code, said = run_watched(clone.git(*arguments), clone.log, said_so_far, SILENT_SECONDS)
    meter.detail = ""
    if code != 0:
        raise failure(said, clone)


def run_watched(
    command: Sequence[str], log: Path, grown: Callable[[], int], seconds: float
) -> tuple[int, str]:
    """Exit code and words of `command`. It is ended, and its code is not 0, when `grown` tells the
    same number for so many seconds."""
    try:
        with log.open("wb") as said:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,  # no terminal that could be asked for a password
            )
            try:
                ended = _watch(process, grown, seconds)
            finally:
                _end_group(process)
        text = log.read_text(errors="replace")
    finally:
        log.unlink(missing_ok=True)
    silence = f"nothing came for {seconds:.0f} s"
    return (process.returncode, text) if ended else (1, f"{text}\nfatal: {silence}")


def _watch(process: subprocess.Popen[bytes], grown: Callable[[], int], seconds: float) -> bool:
    seen, since = -1, time.monotonic()
    while process.poll() is None:
        now = grown()
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > seconds:
            return False
        time.sleep(LOOK_SECONDS)
    return True


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """git starts others (ssh, remote-https, git-lfs), which would go on alone."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def failure(said: str, clone: Clone) -> SourceFailed:
    """What git said, as a reason and a fix."""
    address = urlsplit(clone.url)
    host = address.hostname or clone.url
    for words, kind, reason, fix in MEANINGS:
        if any(word in said for word in words):
            place = {"host": host, "port": address.port or 22}
            return kind(reason.format(**place), fix.format(**place))
    lines = [line.strip() for line in masked(said).splitlines() if line.strip()]
    told = next((line for line in lines if line.startswith(("fatal:", "error:"))), "")
    told = (told or (lines[-1] if lines else "no reason given"))[:200]
    fix = "Check OPENXLAB_MODEL_REPO_URL and this machine's network."
    return Unreachable(f"git could not get the repository from {host} ({told})", fix)


NETWORK = (
    "Let this machine reach it, or name another source (MODELSCOPE_ID, HF_MODEL_ID with "
    "HF_ENDPOINT, MODEL_LOCAL_PATH)."
)
MEANINGS: tuple[tuple[tuple[str, ...], type[SourceFailed], str, str], ...] = (
    (
        ("IDENTIFICATION HAS CHANGED",),
        SourceFailed,
        "{host} shows another ssh key than the one this machine knows, so nothing was fetched",
        "If the change is real, run `ssh-keygen -R [{host}]:{port}` (port 22: -R {host}), then "
        "`ssh-keyscan -p {port} {host} >> ~/.ssh/known_hosts`.",
    ),
    (
        ("Host key verification failed",),
        SourceFailed,
        "ssh does not know the host {host}, so nothing was fetched",
        "Run `ssh-keyscan -p {port} {host} >> ~/.ssh/known_hosts` as this user and compare the key "
        "with the one the host publishes, or use its https:// address.",
    ),
    (
        ("Permission denied (",),
        SourceFailed,
        "{host} refuses this user's ssh key (one with a passphrase needs ssh-agent)",
        "Register the key there, name one with GIT_SSH_COMMAND='ssh -i <key file>', or use the "
        "https:// address with user:token@.",
    ),
    (
        ("Authentication failed", "could not read Username", "could not read Password"),
        SourceFailed,
        "the repository asks for a user and a password, or refuses the given ones",
        "Put user:token@ into OPENXLAB_MODEL_REPO_URL.",
    ),
    (
        ("cannot run ssh",),
        SourceFailed,
        "ssh is not installed",
        "Install it (apt install openssh-client), or use the https:// address.",
    ),
    (
        ("No space left on device", "disk quota exceeded", "Disk quota exceeded"),
        SourceFailed,
        "the disk is full",
        "Free disk space or set WORK_DIR to a larger disk.",
    ),
    (
        ("Could not resolve host", "Connection refused", "Failed to connect", "unreachable"),
        Unreachable,
        "{host} cannot be reached from here",
        NETWORK,
    ),
    (
        ("nothing came for", "timed out", "Operation too slow", "i/o timeout"),
        Unreachable,
        "{host} does not answer",
        NETWORK,
    ),
    (
        ("from HTTP 5", "returned error: 5", "HTTP 429", "returned error: 429"),
        Unreachable,
        "{host} is not serving now",
        "Try later, or name another source.",
    ),
    (
        ("expected OID",),
        Unreachable,
        "{host} sends something else than its pointers promise (a web page?)",
        "Try later, or name another source.",
    ),
    (
        (": EOF", "unexpected EOF", "connection reset", "early EOF"),
        Unreachable,
        "{host} breaks off its answers",
        "Start again: what came is kept and the rest is fetched.",
    ),
    (
        ("' not found", "does not appear to be a git repository", "Repository not found"),
        SourceFailed,
        "{host} has no such repository",
        "Check the spelling of OPENXLAB_MODEL_REPO_URL; a private one needs user:token@ in it.",
    ),
)
