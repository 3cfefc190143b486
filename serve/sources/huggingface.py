"""Hugging Face, or a mirror of it, over its file API.

Files are listed with sizes and hashes and then fetched by our own downloader (one way to resume,
check and report for every source); a complete snapshot in the user's hub cache is used as it is.
Called by loader.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

import httpx

from serve.sources.http import get_json
from serve.sources.offer import Offer, RemoteFile, SourceFailed, wanted

NAME = "Hugging Face"


def offer(client: httpx.Client, endpoint: str, token: str, reference: str) -> Offer:
    """What `owner/name` holds at its main revision. Raises SourceFailed."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    url = f"{endpoint.rstrip('/')}/api/models/{quote(reference)}?blobs=true"
    answer = get_json(client, url, NAME, f"model {reference}", headers)
    siblings = answer.get("siblings") if isinstance(answer, dict) else None
    if not isinstance(siblings, list):
        raise SourceFailed(f"{NAME} does not list the files of {reference}")
    revision = str(answer.get("sha") or "main")
    base = f"{endpoint.rstrip('/')}/{quote(reference)}/resolve/{quote(revision)}"
    files = [_file(base, entry) for entry in siblings if isinstance(entry, dict)]
    return Offer(NAME, reference, wanted(files, NAME, reference), revision, headers)


def _file(base: str, entry: dict[str, object]) -> RemoteFile:
    path = str(entry.get("rfilename", ""))
    size = entry.get("size")
    lfs = entry.get("lfs")
    sha256 = lfs.get("sha256") or lfs.get("oid") if isinstance(lfs, dict) else None
    blob = None if lfs else entry.get("blobId")
    is_sha1 = isinstance(blob, str) and re.fullmatch(r"[0-9a-f]{40}", blob)
    return RemoteFile(
        path,
        f"{base}/{quote(path)}",
        size if isinstance(size, int) else None,
        str(sha256) if sha256 else None,
        str(blob) if is_sha1 else None,
    )


def cached(reference: str) -> Path | None:
    """A snapshot that the user's hub cache holds already (a Space's preload_from_hub puts it
    there), if its weights are whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(reference, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    has_weights = any(folder.glob("*.safetensors")) and (folder / "config.json").exists()
    return folder if has_weights else None
