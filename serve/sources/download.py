"""Fetches an offer's files into a folder so that only whole, checked files ever have their names.

Bytes go to `name.part`, resume where they stopped after any break, and get their name when size
and hash agree. Two processes on one folder take turns. Knows no hub and no model. Called by
loader.py with an Offer of any source.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from filelock import BaseFileLock, FileLock, Timeout

from serve.sources.http import check_status, unreachable
from serve.sources.meter import Meter, gigabytes
from serve.sources.offer import Offer, RemoteFile, SourceFailed, Unreachable, is_plain_name

log = logging.getLogger(__name__)

BLOCK_BYTES = 1 << 20
SPARE_DISK_BYTES = 64 * 2**20
RESTARTS = 2
MANIFEST = ".complete.json"
POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a failing transfer is tried: attempts in a row without one new byte."""

    attempts: int = 4
    pause_seconds: float = 0.5
    workers: int = 3


def download(
    client: httpx.Client,
    offer: Offer,
    folder: Path,
    meter: Meter,
    patience: Patience = Patience(),
) -> Path:
    """Make `folder` hold every file of `offer`, whole. Raises SourceFailed; what came stays for
    the next try, and no file is waited for once another has failed."""
    stop = threading.Event()
    with turn(folder, meter):
        check_disk(offer, folder)
        with ThreadPoolExecutor(patience.workers, "download") as pool:
            tasks = [
                pool.submit(_Transfer(client, offer, file, folder, meter, patience, stop).run)
                for file in offer.files
            ]
            try:
                for task in as_completed(tasks):
                    task.result()
            except BaseException:
                stop.set()
                for task in tasks:
                    task.cancel()
                raise
        write_manifest(offer, folder)
    return folder


def is_complete(folder: Path) -> bool:
    """True when a former download ended and its files still have their sizes."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return all(
            (folder / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@contextmanager
def turn(folder: Path, meter: Meter) -> Iterator[None]:
    """Make `folder` and have it alone; what the disk refuses meanwhile is a SourceFailed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(FileLock(folder / ".lock"), meter):
            yield
    except OSError as error:
        raise _disk_failure(error) from error


@contextmanager
def _alone(lock: BaseFileLock, meter: Meter) -> Iterator[None]:
    while True:
        try:
            lock.acquire(timeout=1.0)
            break
        except Timeout:
            meter.detail = "another process is fetching the same model"
    meter.detail = ""
    try:
        yield
    finally:
        lock.release()


def check_disk(offer: Offer, folder: Path, elsewhere: int = 0) -> None:
    """Raise SourceFailed when what has still to come does not fit; `elsewhere` is how many bytes
    of it this disk has in another folder."""
    missing = -elsewhere
    for file in offer.files:
        here = next((p for p in (folder / file.path, _part(folder, file)) if p.exists()), None)
        missing += max((file.size or 0) - (here.stat().st_size if here else 0), 0)
    free = shutil.disk_usage(folder).free
    if missing > 0 and free < missing + SPARE_DISK_BYTES:
        raise SourceFailed(
            f"{gigabytes(missing)} have still to come and {gigabytes(SPARE_DISK_BYTES)} must stay "
            f"free, but the disk has {gigabytes(free)} free",
            f"Free {gigabytes(missing + SPARE_DISK_BYTES - free)} or set WORK_DIR to another disk.",
        )


def write_manifest(offer: Offer, folder: Path) -> None:
    sizes = {file.path: (folder / file.path).stat().st_size for file in offer.files}
    written = {"source": offer.source, "reference": offer.reference, "revision": offer.revision}
    part = folder / (MANIFEST + ".part")
    part.write_text(json.dumps({**written, "files": sizes}))
    part.replace(folder / MANIFEST)


def _part(folder: Path, file: RemoteFile) -> Path:
    return folder / (file.path + ".part")


class _Broken(Exception):
    """One attempt failed in a way that another attempt may mend."""


class _Transfer:
    """One file on its way."""

    def __init__(
        self,
        client: httpx.Client,
        offer: Offer,
        file: RemoteFile,
        folder: Path,
        meter: Meter,
        patience: Patience,
        stop: threading.Event,
    ) -> None:
        if not is_plain_name(file.path):
            raise SourceFailed(f"{offer.source} names a file outside the model: {file.path!r}")
        self._client = client
        self._offer = offer
        self._file = file
        self._target = folder / file.path
        self._part = _part(folder, file)
        self._meter = meter
        self._patience = patience
        self._stop = stop
        self._size = file.size

    def run(self) -> None:
        if self._is_here():
            self._meter.found(self._target.stat().st_size)
            return
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._meter.found(self._have())
        fruitless = restarts = 0
        while True:
            before = self._have()
            try:
                self._fetch_rest()
                if self._is_right():
                    self._finish()
                    return
                if restarts == RESTARTS:
                    raise SourceFailed(
                        f"{self._file.path} from {self._offer.source} does not have the content "
                        "that its listing promises",
                        "Try later, or another source.",
                    )
                restarts += 1  # the part may be of an older revision: again from zero
                self._forget()
                continue
            except _Broken as broken:
                fruitless = 0 if self._have() > before else fruitless + 1
                self._give_up_or_wait(fruitless, broken)

    def _give_up_or_wait(self, fruitless: int, broken: _Broken) -> None:
        if fruitless >= self._patience.attempts:
            raise Unreachable(
                f"{self._file.path} could not be fetched from {self._offer.source}: {broken}",
                "Start again: what came is kept and the rest is fetched.",
            )
        self._meter.attempt += 1
        self._meter.detail = str(broken)
        log.info("%s from %s: %s; trying on", self._file.path, self._offer.source, broken)
        self._stop.wait(self._patience.pause_seconds * 2 ** min(fruitless, 5))
        self._go_on()

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise SourceFailed(f"{self._file.path} was left, for another file failed")

    def _have(self) -> int:
        return self._part.stat().st_size if self._part.exists() else 0

    def _is_here(self) -> bool:
        if not self._target.exists():
            return False
        return self._size is None or self._target.stat().st_size == self._size

    def _fetch_rest(self) -> None:
        """One request for what is missing. Raises _Broken, SourceFailed or OSError."""
        have = self._have()
        if self._size is not None and have > self._size:
            self._forget()
            have = 0
        if self._size is not None and have == self._size and self._part.exists():
            return
        headers = dict(self._offer.headers)
        if have:
            headers["Range"] = f"bytes={have}-"
        try:
            with self._client.stream("GET", self._file.url, headers=headers) as response:
                self._receive(response, have)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _Broken(unreachable(self._offer.source, error).reason) from error

    def _receive(self, response: httpx.Response, have: int) -> None:
        source = self._offer.source
        if response.status_code == 416:  # what we have is not a beginning of it
            self._forget()
            raise _Broken(f"{source} has a different file now")
        try:
            check_status(response, source, self._file.path)
        except Unreachable as failure:
            raise _Broken(failure.reason) from None
        kind = response.headers.get("content-type", "")
        if "text/html" in kind and not self._file.path.endswith(".html"):
            raise _Broken(f"{source} answered with a web page instead of the file")
        if have and response.status_code == 200:
            self._forget()  # the server knows no ranges and sends it whole
        elif have and not _continues(response, have):
            raise _Broken(f"{source} sent another part of the file than was asked for")
        expected = self._expected(response)
        with self._part.open("ab") as out:
            for chunk in response.iter_raw():
                self._go_on()
                out.write(chunk)
                self._meter.add(len(chunk))
        self._meter.detail = ""
        if expected is None:
            self._size = self._size if self._size is not None else self._have()
        elif self._have() != expected:
            if self._have() > expected:
                self._forget()
            raise _Broken(f"{source} sent {self._have()} of {expected} bytes")

    def _expected(self, response: httpx.Response) -> int | None:
        if self._size is not None:
            return self._size
        length = response.headers.get("content-length")
        if length is None or not length.isdigit():
            return None
        self._size = self._have() + int(length)
        return self._size

    def _forget(self) -> None:
        if self._part.exists():
            self._meter.add(-self._have())
            self._part.unlink()

    def _is_right(self) -> bool:
        if self._size is not None and self._have() != self._size:
            return False
        with self._part.open("rb") as stored:
            is_pointer = stored.read(len(POINTER)) == POINTER
        if is_pointer:
            return False
        if self._file.sha256:
            return sha256_of(self._part) == self._file.sha256.lower()
        if self._file.git_sha1:
            return _git_sha1_of(self._part) == self._file.git_sha1.lower()
        return True

    def _finish(self) -> None:
        with self._part.open("rb+") as stored:
            os.fsync(stored.fileno())
        self._part.replace(self._target)


def _continues(response: httpx.Response, have: int) -> bool:
    return response.headers.get("content-range", "").startswith(f"bytes {have}-")


def _disk_failure(error: OSError) -> SourceFailed:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SourceFailed("the disk is full", "Free disk space or set WORK_DIR to a larger disk.")
    return SourceFailed(f"the folder cannot be written ({error.strerror})", "Set WORK_DIR.")


def sha256_of(path: Path) -> str:
    return _digest(path, hashlib.sha256())


def _git_sha1_of(path: Path) -> str:
    start = f"blob {path.stat().st_size}\0".encode()
    return _digest(path, hashlib.sha1(start, usedforsecurity=False))


def _digest(path: Path, hasher: Any) -> str:
    with path.open("rb") as stored:
        while block := stored.read(BLOCK_BYTES):
            hasher.update(block)
    return str(hasher.hexdigest())
