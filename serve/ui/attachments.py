"""Attached files as parts of a message: pictures as they are, text and PDF files as their text.

What a file is, is read from its bytes, never from its name or the browser's word. A file that
cannot be read becomes a note, not an error: the rest of the message is still answered. Knows no
widgets and no model. Used by chat.py and endpoints.py.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from serve.values import ImagePart, Part, TextPart

MAX_FILES = 16
MAX_BYTES = 20_000_000
MAX_CHARACTERS = 400_000
MAX_PAGES = 300

Kind = Literal["image", "text", "pdf", "unreadable"]


@dataclass(frozen=True, slots=True)
class Attachment:
    """One file, read. `note` is a code the browser has words for; `text` what was read of it."""

    name: str
    kind: Kind
    size: int
    text: str = ""
    data: bytes = field(default=b"", repr=False)
    media_type: str = ""
    note: str = ""
    pages: int = 0

    def part(self) -> Part | None:
        """What the model gets of it; None for a file that could not be read."""
        if self.kind == "image":
            return ImagePart(self.data, self.media_type)
        return file_text(self.name, self.text) if self.text else None

    def record(self) -> dict[str, Any]:
        """What the browser keeps: everything but a picture's bytes, which it has already."""
        return {
            "name": self.name,
            "kind": self.kind,
            "size": self.size,
            "text": self.text,
            "note": self.note,
            "pages": self.pages,
        }


def file_text(name: str, text: str) -> TextPart:
    """A text file inside a message, its name and its end marked."""
    return TextPart(f"[{name}]\n{text}\n[/{name}]\n\n")


def read_files(paths: Iterable[str | Path]) -> list[Attachment]:
    """Blocking: call it off the event loop. At most MAX_FILES are read."""
    return [read(Path(path).name, Path(path).read_bytes()) for path in list(paths)[:MAX_FILES]]


def read(name: str, data: bytes) -> Attachment:
    size = len(data)
    if size > MAX_BYTES:
        return Attachment(name, "unreadable", size, note="file_too_large")
    media_type = image_type(data)
    if media_type:
        return Attachment(name, "image", size, data=data, media_type=media_type)
    if data[:1024].lstrip()[:5] == b"%PDF-":
        return _read_pdf(name, data)
    text = _decode(data)
    if text is None:
        return Attachment(name, "unreadable", size, note="file_not_readable")
    return _as_text(name, "text", size, text)


def image_type(data: bytes) -> str:
    """The media type of a PNG, JPEG, GIF or WebP by its first bytes, else ""."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return ""


def _as_text(name: str, kind: Kind, size: int, text: str, pages: int = 0) -> Attachment:
    if not text.strip():
        return Attachment(name, "unreadable", size, note="file_has_no_text", pages=pages)
    note = "file_cut" if len(text) > MAX_CHARACTERS else ""
    return Attachment(name, kind, size, text=text[:MAX_CHARACTERS], note=note, pages=pages)


def _decode(data: bytes) -> str | None:
    """UTF-8, or with a byte order mark UTF-16, or the Chinese GB 18030; None for binary data."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings = ["utf-16"]
    elif b"\0" in data:
        return None
    else:
        encodings = ["utf-8-sig", "gb18030"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        # Any bytes can pass for GB 18030; control characters show that they were no text.
        if not any(ord(c) < 32 and c not in "\t\n\r\f\x1b" for c in text):
            return text
    return None


def _read_pdf(name: str, data: bytes) -> Attachment:
    # Imported here: a page without PDFs need not load it.
    import pypdf
    from pypdf.errors import PyPdfError

    try:
        pages = pypdf.PdfReader(io.BytesIO(data)).pages
        count = len(pages)
        text = "\n\n".join(pages[i].extract_text() for i in range(min(count, MAX_PAGES)))
    except (PyPdfError, ValueError, KeyError, TypeError, IndexError, AttributeError, OSError):
        # pypdf meets broken files with any of these; the file is told apart, not the cause.
        return Attachment(name, "unreadable", len(data), note="file_not_readable")
    return _as_text(name, "pdf", len(data), text, pages=count)
