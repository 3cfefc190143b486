"""A model in a Git LFS repository (OpenXLab has mirrors): pointers, then what is wanted.

The clone holds pointers; they tell sizes and hashes; `git lfs fetch` brings the objects (and
resumes them), which are then moved, not copied, to the model's folder, so the disk holds them once.
A password in an address goes to a private file, never to an argument list, a log or a message.
git itself is run by git.py. Called by loader.py, which holds the folder's lock meanwhile.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from serve.sources.download import check_disk, sha256_of, write_manifest
from serve.sources.git import Clone, ask, failure, run_watched
from serve.sources.meter import Meter
from serve.sources.offer import Offer, RemoteFile, SourceFailed, masked, wanted

NAME = "Git LFS"
SILENT_SECONDS = 12.0  # git-lfs ends a silent transfer by itself after 10, a redirect loop never
ATTEMPTS = 4
POINTER = re.compile(
    rb"version https://git-lfs\S*\n(?:ext-.*\n)*oid sha256:([0-9a-f]{64})\nsize (\d+)\n"
)


def offer(url: str, subfolder: str, folder: Path, meter: Meter) -> tuple[Offer, Clone]:
    """What the repository's newest state holds, from a clone of its pointers into `folder`.
    Raises SourceFailed."""
    for program in ("git", "git-lfs"):
        if shutil.which(program) is None:
            raise SourceFailed(
                f"{program} is not installed", "Install git and git-lfs (apt install git git-lfs)."
            )
    clone = _clone(url, folder, meter)
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
    stored = _stored_bytes(clone)
    meter.found(stored)
    check_disk(offer, folder, elsewhere=stored)
    missing = [file for file in offer.files if file.sha256 and not _is_here(file, folder)]
    _fetch_objects(clone, missing, meter)
    for file in offer.files:
        _place(file, clone, folder)
    write_manifest(offer, folder)
    shutil.rmtree(clone.folder, ignore_errors=True)
    return folder


def model_name(url: str, subfolder: str) -> str:
    """What a model of this repository is called: owner/name of its address, and its folder."""
    path = urlsplit(url).path.strip("/").removesuffix(".git")
    name = "/".join(path.split("/")[-2:])
    return f"{name}/{subfolder}" if subfolder and "/" not in subfolder else name


def _clone(url: str, folder: Path, meter: Meter) -> Clone:
    """Make or renew a clone of one commit. What a broken try left is thrown away."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    is_ssh = parts.scheme == "ssh"
    user = quote(unquote(parts.username or ""), safe="")
    bare = f"{user}@{host}" if is_ssh and user else host  # ssh takes no password from an address
    clone = Clone(folder, urlunsplit(parts._replace(netloc=bare)))
    folder.mkdir(parents=True, exist_ok=True)
    clone.credentials.unlink(missing_ok=True)
    if user and not is_ssh:
        clone.credentials.touch(mode=0o600)
        password = quote(unquote(parts.password or ""), safe="")
        clone.credentials.write_text(f"{parts.scheme}://{user}:{password}@{host}\n")
    if not (folder / ".git" / "HEAD").exists():
        ask(clone, meter, "init", "--quiet")
    for lock in (folder / ".git").glob("*.lock"):
        lock.unlink(missing_ok=True)  # of a process that was killed
    ask(clone, meter, "config", "remote.origin.url", clone.url)
    ask(clone, meter, "fetch", "--progress", "--depth", "1", "--no-tags", "origin", "HEAD")
    ask(clone, meter, "reset", "--quiet", "--hard", "FETCH_HEAD")
    return clone


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
            raise failure(said, clone)
        if said:
            meter.attempt += 1
            meter.detail = failure(said, clone).reason
            time.sleep(0.2 * 2**fruitless)
    meter.detail = ""


def _fetch_once(clone: Clone, files: Sequence[RemoteFile], meter: Meter) -> str:
    """One run; what it said when it failed. A run that brings nothing for a while is ended."""
    names = ",".join(_escaped(file.url) for file in files)

    def stored() -> int:
        now = _stored_bytes(clone)
        meter.set_done(now)
        return now

    command = clone.git("lfs", "fetch", "origin", f"--include={names}", "--exclude=")
    code, said = run_watched(command, clone.log, stored, SILENT_SECONDS)
    stored()
    return said or "git lfs stopped" if code != 0 else ""


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
