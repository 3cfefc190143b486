"""A model in a Git LFS repository (OpenXLab has mirrors): pointers, then what is wanted.

git and git-lfs run as subprocesses with argument lists, without a shell and without prompts. The
clone holds pointers; they tell sizes and hashes; `git lfs fetch` brings the objects (and resumes
them), which are then moved, not copied, to the model's folder, so the disk holds them once. A
password in an address goes to a private file, never to an argument list, a log or a message.
Called by loader.py.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from serve.sources.download import check_disk, sha256_of, turn, write_manifest
from serve.sources.meter import Meter
from serve.sources.offer import Offer, RemoteFile, SourceFailed, Unreachable, wanted

NAME = "Git LFS"
CLONE_SECONDS = 60.0
SILENT_SECONDS = 60.0
ATTEMPTS = 4
POINTER = re.compile(
    rb"version https://git-lfs\S*\n(?:ext-.*\n)*oid sha256:([0-9a-f]{64})\nsize (\d+)\n"
)


@dataclass(frozen=True, slots=True)
class Clone:
    """A clone that holds pointers; `url` has no password in it."""

    folder: Path
    url: str

    def git(self, *arguments: str) -> list[str]:
        return [
            "env",
            "GIT_TERMINAL_PROMPT=0",
            "GIT_LFS_SKIP_SMUDGE=1",
            "git",
            "-C",
            str(self.folder),
            "-c",
            "credential.helper=",
            "-c",
            f"credential.helper=store --file={self.folder / '.credentials'}",
            "-c",
            "core.askPass=true",
            "-c",
            "core.sshCommand=ssh -oBatchMode=yes -oConnectTimeout=5",
            "-c",
            "lfs.transfer.maxretries=1",  # the loop here tries again, and tells how it goes
            "-c",
            "lfs.transfer.maxretrydelay=1",
            "-c",
            "protocol.file.allow=never",
            "-c",
            "protocol.ext.allow=never",
            *arguments,
        ]


def offer(url: str, subfolder: str, folder: Path) -> tuple[Offer, Clone]:
    """What the repository's newest state holds, from a clone of its pointers into `folder`.
    Raises SourceFailed."""
    for program in ("git", "git-lfs"):
        if shutil.which(program) is None:
            raise SourceFailed(
                f"{program} is not installed", "Install git and git-lfs (apt install git git-lfs)."
            )
    clone = _clone(url, folder)
    top = clone.folder / subfolder
    if not top.is_dir():
        raise SourceFailed(
            f"the repository has no folder {subfolder!r}", "Check OPENXLAB_MODEL_SUBDIR."
        )
    files = [_file(path, subfolder) for path in sorted(top.iterdir()) if path.is_file()]
    kept = [file for file in files if not file.path.startswith(".")]
    shown = masked(url)
    return Offer(NAME, shown, wanted(kept, NAME, shown)), clone


def fetch(offer: Offer, clone: Clone, folder: Path, meter: Meter) -> Path:
    """Bring the offer's files into `folder`; the clone is removed then. Raises SourceFailed."""
    folder.mkdir(parents=True, exist_ok=True)
    with turn(folder, meter):
        check_disk(offer, folder)
        missing = [file for file in offer.files if file.sha256 and not _is_here(file, folder)]
        _fetch_objects(clone, missing, meter)
        for file in offer.files:
            _place(file, clone, folder)
        write_manifest(offer, folder)
    shutil.rmtree(clone.folder, ignore_errors=True)
    return folder


def masked(text: str) -> str:
    """`text` without the user and password of any address in it."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def model_name(url: str, subfolder: str) -> str:
    """What a model of this repository is called: owner/name of its address, and its folder."""
    path = urlsplit(url).path.strip("/").removesuffix(".git")
    name = "/".join(path.split("/")[-2:])
    return f"{name}/{subfolder}" if subfolder and "/" not in subfolder else name


def _clone(url: str, folder: Path) -> Clone:
    """Make or renew a clone of one commit. What a broken try left is thrown away."""
    parts = urlsplit(url)
    bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    is_ssh = parts.scheme == "ssh"
    clone = Clone(folder, url if is_ssh else bare)
    folder.mkdir(parents=True, exist_ok=True)
    if not is_ssh and parts.username:
        store = folder / ".credentials"
        store.touch(mode=0o600)
        user, password = unquote(parts.username), unquote(parts.password or "")
        pair = f"{quote(user, safe='')}:{quote(password, safe='')}"
        store.write_text(f"{parts.scheme}://{pair}@{parts.netloc.rpartition('@')[2]}\n")
    if not (folder / ".git" / "HEAD").exists():
        _run(clone, "init", "--quiet")
    for lock in (folder / ".git").glob("*.lock"):
        lock.unlink(missing_ok=True)  # of a process that was killed
    _run(clone, "config", "remote.origin.url", clone.url)
    _run(clone, "fetch", "--quiet", "--depth", "1", "--no-tags", "origin", "HEAD")
    _run(clone, "reset", "--quiet", "--hard", "FETCH_HEAD")
    return clone


def _run(clone: Clone, *arguments: str) -> None:
    try:
        done = subprocess.run(
            clone.git(*arguments),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CLONE_SECONDS,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # no terminal that could be asked for a password
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unreachable("the repository does not answer", "Try later.") from None
    except OSError as error:
        raise SourceFailed(f"git cannot run ({error.strerror})", "Install git.") from error
    if done.returncode != 0:
        raise _failure(done.stderr)


def _failure(said: str) -> SourceFailed:
    lines = [line for line in masked(said).splitlines() if line.strip()]
    words = next((line for line in lines if line.startswith(("fatal:", "error:"))), "")
    words = (words or (lines[-1] if lines else "no reason given")).strip()[:200]
    if "Authentication failed" in said or "could not read Username" in said:
        return SourceFailed(
            "the repository asks for a user and a password, or refuses the given ones",
            "Put user:token@ into OPENXLAB_MODEL_REPO_URL.",
        )
    fix = "Check OPENXLAB_MODEL_REPO_URL and this machine's network."
    return Unreachable(f"git could not get the repository ({words})", fix)


def _file(path: Path, subfolder: str) -> RemoteFile:
    size = path.stat().st_size
    found = POINTER.match(path.read_bytes()) if size < 1024 else None
    inside = f"{subfolder}/{path.name}" if subfolder else path.name
    if found is None:
        return RemoteFile(path.name, inside, size)
    return RemoteFile(path.name, inside, int(found[2]), found[1].decode())


def _is_here(file: RemoteFile, folder: Path) -> bool:
    target = folder / file.path
    return target.exists() and target.stat().st_size == file.size


def _fetch_objects(clone: Clone, missing: Sequence[RemoteFile], meter: Meter) -> None:
    """Run `git lfs fetch` until every object is there; it goes on where it stopped."""
    fruitless = 0
    while left := [file for file in missing if not _object(clone, file).exists()]:
        before = _stored_bytes(clone)
        said = _fetch_once(clone, left, meter)
        fruitless = 0 if _stored_bytes(clone) > before else fruitless + 1
        if fruitless >= ATTEMPTS:
            raise _failure(said)
        if said:
            meter.attempt += 1
            time.sleep(0.2 * 2**fruitless)


def _fetch_once(clone: Clone, files: Sequence[RemoteFile], meter: Meter) -> str:
    """One run; what it said when it failed. A run that brings nothing for a while is ended."""
    names = ",".join(_escaped(file.url) for file in files)
    command = clone.git("lfs", "fetch", "origin", f"--include={names}", "--exclude=")
    log = clone.folder / ".git" / "lfs-fetch.log"
    with log.open("wb") as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        seen, since = -1, time.monotonic()
        while process.poll() is None:
            now = _stored_bytes(clone)
            if now != seen:
                seen, since = now, time.monotonic()
                meter.set_done(now)
            elif time.monotonic() - since > SILENT_SECONDS:
                process.kill()
            time.sleep(0.1)
    meter.set_done(_stored_bytes(clone))
    text = log.read_text(errors="replace")
    return text or "git lfs stopped" if process.returncode != 0 else ""


def _escaped(name: str) -> str:
    return re.sub(r"([\[\]*?\\!])", r"\\\1", name)


def _stored_bytes(clone: Clone) -> int:
    total = 0
    for path in (clone.folder / ".git" / "lfs").rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # renamed while we look
            continue
    return total


def _object(clone: Clone, file: RemoteFile) -> Path:
    oid = str(file.sha256)
    return clone.folder / ".git" / "lfs" / "objects" / oid[:2] / oid[2:4] / oid


def _place(file: RemoteFile, clone: Clone, folder: Path) -> None:
    target, part = folder / file.path, folder / (file.path + ".part")
    if file.sha256 is None:
        shutil.copyfile(clone.folder / file.url, part)
    elif _is_here(file, folder):
        return
    else:
        stored = _object(clone, file)
        if stored.stat().st_size != file.size or sha256_of(stored) != file.sha256:
            stored.unlink()
            raise SourceFailed(f"{file.path} came broken", "Start again; it is fetched once more.")
        stored.replace(part)
    part.replace(target)
