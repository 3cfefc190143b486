"""What a source holds for a model, which of its files a load needs, and how a source fails.

Values and choices only: no network and no disk. Used by every source, the downloader and loader.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

WANTED = (".json", ".safetensors", ".jinja", ".txt", ".model")
GGUF_PREFERENCE = ("mxfp4", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "bf16", "f16")


class SourceFailed(Exception):
    """A source cannot give a model: why, and what to set or do. Both in plain words."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix


class Unreachable(SourceFailed):
    """The source itself does not answer: no other model of it needs to be asked for."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """`path` is relative to the model's folder. A hash is None where the source tells none."""

    path: str
    url: str
    size: int | None = None
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """A model at a source. `headers` carry its authorization, never shown."""

    source: str
    reference: str
    files: tuple[RemoteFile, ...]
    revision: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def total_bytes(self) -> int:
        return sum(f.size or 0 for f in self.files)

    @property
    def weight_bytes(self) -> int:
        return sum(f.size or 0 for f in self.files if f.path.endswith((".safetensors", ".gguf")))

    @property
    def gguf(self) -> RemoteFile | None:
        return next((f for f in self.files if f.path.endswith(".gguf")), None)

    def file(self, path: str) -> RemoteFile | None:
        return next((f for f in self.files if f.path == path), None)


def wanted(files: Sequence[RemoteFile], source: str, reference: str) -> tuple[RemoteFile, ...]:
    """Only what the load needs: top-level configs, tokenizer, template and safetensors, or one
    GGUF. Copies for other programs (original/, metal/, .bin, .onnx) are left out."""
    top = [f for f in files if len(PurePosixPath(f.path).parts) == 1 and is_plain_name(f.path)]
    weights = [f for f in top if f.path.endswith(".safetensors")]
    side = [f for f in top if f.path.endswith(WANTED) and f not in weights]
    if weights:
        return (*side, *_one_set(weights, side))
    ggufs = [f for f in top if f.path.endswith(".gguf") and "-of-" not in f.path]
    if ggufs:
        return (*side, min(ggufs, key=_gguf_rank))
    raise SourceFailed(
        f"{reference} on {source} has neither safetensors nor a GGUF file at its top",
        "Name a repository with .safetensors or .gguf files; other formats can run code.",
    )


def is_plain_name(path: str) -> bool:
    """False for names that would leave the folder or hide in it."""
    parts = PurePosixPath(path).parts
    return (
        bool(parts) and not path.startswith(("/", ".")) and ".." not in parts and "\\" not in path
    )


def _one_set(weights: list[RemoteFile], side: list[RemoteFile]) -> list[RemoteFile]:
    """Some repositories hold the shards and a joined or consolidated copy: never fetch both."""
    shards = [f for f in weights if "-of-" in f.path]
    has_index = any(f.path == "model.safetensors.index.json" for f in side)
    if has_index and shards:
        return shards
    single = [f for f in weights if f.path == "model.safetensors"]
    return single or weights


def _gguf_rank(file: RemoteFile) -> tuple[int, str]:
    name = file.path.lower()
    places = [i for i, kind in enumerate(GGUF_PREFERENCE) if kind in name]
    return (min(places, default=len(GGUF_PREFERENCE)), name)


def masked(text: str) -> str:
    """`text` without the user and password of any address in it."""
    return re.sub(r"//[^\s'\"]*@", "//***@", text)
