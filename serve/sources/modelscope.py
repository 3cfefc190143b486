"""ModelScope over its file API.

Like Hugging Face here: a listing with sizes and SHA-256, then our own downloader. A snapshot in
the user's ModelScope cache is found through the light client (modelscope_hub, which does not
import torch). Called by loader.py.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import httpx

from serve.sources.http import get_json
from serve.sources.offer import Offer, RemoteFile, SourceFailed, wanted

NAME = "ModelScope"
BRANCH = "master"


def offer(client: httpx.Client, endpoint: str, token: str, reference: str) -> Offer:
    """What `owner/name` holds on its branch. Raises SourceFailed."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    base = f"{endpoint.rstrip('/')}/api/v1/models/{quote(reference)}/repo"
    url = f"{base}/files?Revision={BRANCH}&Recursive=False"
    answer = get_json(client, url, NAME, f"model {reference}", headers)
    data = answer.get("Data") if isinstance(answer, dict) else None
    entries = data.get("Files") if isinstance(data, dict) else data
    if not isinstance(entries, list):
        said = answer.get("Message") if isinstance(answer, dict) else None
        raise SourceFailed(f"{NAME} does not list the files of {reference}: {said or 'no reason'}")
    files = [_file(base, entry) for entry in entries if _is_file(entry)]
    return Offer(NAME, reference, wanted(files, NAME, reference), BRANCH, headers)


def _is_file(entry: object) -> bool:
    return isinstance(entry, dict) and entry.get("Type", "blob") == "blob"


def _file(base: str, entry: dict[str, object]) -> RemoteFile:
    path = str(entry.get("Path") or entry.get("Name") or "")
    size = entry.get("Size")
    sha256 = entry.get("Sha256")
    return RemoteFile(
        path,
        f"{base}?Revision={BRANCH}&FilePath={quote(path, safe='')}",
        size if isinstance(size, int) else None,
        str(sha256) if sha256 else None,
    )


def cached(reference: str) -> Path | None:
    """A snapshot that the user's ModelScope cache holds already."""
    from modelscope_hub.compat.snapshot_download import snapshot_download
    from modelscope_hub.errors import CacheNotFound

    try:
        folder = Path(snapshot_download(reference, local_files_only=True))
    except (CacheNotFound, ValueError):
        return None
    has_weights = any(folder.glob("*.safetensors")) and (folder / "config.json").exists()
    return folder if has_weights else None
