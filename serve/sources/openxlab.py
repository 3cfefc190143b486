"""OpenXLab through its SDK, which signs in and lists; the bytes are fetched by our own downloader.

The SDK (0.1.3, pinned to old libraries, without time-outs, with a downloader that keeps cut-off
files) never enters this process: it is installed without its dependencies into a folder of its own
on first need, and run there by openxlab_listing.py with a time limit. The service is being wound
down (README says so); every failure leads on to the next source. Called by loader.py.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from filelock import FileLock

from serve.sources.http import unreachable
from serve.sources.offer import Offer, RemoteFile, SourceFailed, Unreachable, wanted
from serve.sources.registry import run_pip

NAME = "OpenXLab"
SDK = "openxlab==0.1.3"
SDK_EXTRAS = ("pytz",)  # the one library the SDK's sign-in needs that we do not have anyway
LISTING = Path(__file__).with_name("openxlab_listing.py")
LISTING_SECONDS = 10.0
INSTALL_SECONDS = 120.0
FIX = "Use MODELSCOPE_ID or HF_MODEL_ID instead: OpenXLab is being wound down."


def offer(
    client: httpx.Client, endpoint: str, keys: tuple[str, str], reference: str, sdk: Path
) -> Offer:
    """What `owner/name` holds. `keys` are the access and the secret key, or empty; `sdk` is where
    the SDK is or will be. Raises SourceFailed."""
    install_sdk(sdk)
    answer = _listing(endpoint, keys, reference, sdk)
    entries = answer.get("files")
    if not isinstance(entries, Mapping) or not entries:
        raise SourceFailed(f"{NAME} lists no files of {reference}", "Check the spelling of the id.")
    files = [_file(name, entry) for name, entry in entries.items() if isinstance(entry, Mapping)]
    chosen = wanted(files, NAME, reference)
    with ThreadPoolExecutor(6, "openxlab-sizes") as pool:
        sized = tuple(pool.map(lambda file: _with_size(client, file), chosen))
    return Offer(NAME, reference, sized)


def install_sdk(folder: Path) -> None:
    """Put the SDK into `folder` unless it is there, whole or not at all. Raises SourceFailed."""
    if _has_sdk(folder):
        return
    fix = f"Run `pip install --no-deps --target {folder} {SDK} pytz`, or name another source."
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not _has_sdk(folder):  # another process may have put it there meanwhile
                _install(folder, fix)
    except OSError as error:
        raise SourceFailed(f"{SDK} cannot be put into {folder} ({error.strerror})", fix) from error


def _has_sdk(folder: Path) -> bool:
    return (folder / "openxlab" / "__init__.py").exists()


def _install(folder: Path, fix: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / "sdk"
        command = ["install", "--no-deps", "--target", str(made), SDK, *SDK_EXTRAS]
        run_pip(command, SDK, fix, seconds=INSTALL_SECONDS, scratch=Path(scratch))
        shutil.rmtree(folder, ignore_errors=True)
        made.replace(folder)


def _listing(endpoint: str, keys: tuple[str, str], reference: str, sdk: Path) -> dict[str, Any]:
    """Run the SDK elsewhere. Its own messages repeat keys, so only our script's words are used."""
    asked = {"sdk": str(sdk), "endpoint": endpoint, "keys": keys, "repository": reference}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-s", str(LISTING)],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            timeout=LISTING_SECONDS,
            check=False,
        )
        answer = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{NAME} does not answer", FIX) from None
    except ValueError:
        raise SourceFailed(f"{NAME}'s SDK broke off", FIX) from None
    if "error" in answer:
        raise Unreachable(f"{NAME} {answer['error']}", FIX)
    return dict(answer)


def _file(name: str, entry: Mapping[str, Any]) -> RemoteFile:
    told = str(entry.get("hash") or "")
    is_sha256 = re.fullmatch(r"[0-9a-fA-F]{64}", told) is not None
    return RemoteFile(
        str(entry.get("fileName") or name),
        str(entry.get("url", "")),
        None,
        told if is_sha256 else None,
    )


def _with_size(client: httpx.Client, file: RemoteFile) -> RemoteFile:
    """The listing tells no sizes; the file server does. (A URL may be signed for GET only.)"""
    try:
        with client.stream("GET", file.url, headers={"Range": "bytes=0-0"}) as answer:
            status, headers = answer.status_code, answer.headers
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise unreachable(f"{NAME}'s file server", error) from error
    told = headers.get("content-range", "").rpartition("/")[2]
    size = told if status == 206 else headers.get("content-length", "")
    if status not in (200, 206) or "html" in headers.get("content-type", "") or not size.isdigit():
        raise Unreachable(f"{NAME}'s file server does not give {file.path}", FIX)
    return RemoteFile(file.path, file.url, int(size), file.sha256)
