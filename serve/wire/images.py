"""An image as a request carries it: a data: URL, turned into an ImagePart.

Decoding is checked strictly; the kind of picture is read from its first bytes, never from its
label. Pixels are not decoded here. Used by parts.py.
"""

from __future__ import annotations

import base64
import binascii
from typing import Literal, cast

from serve.errors import InvalidRequest, Unsupported
from serve.values import ImagePart
from serve.wire import bounds
from serve.wire.body import Body

_KINDS = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
)


def read_image(part: Body, name: str) -> ImagePart:
    """`part[name]` is the URL itself (Responses) or an object with url and detail (chat)."""
    inner = part
    if isinstance(part.get(name), dict):
        inner, name = part.required_object(name), "url"
    url = inner.required_text(name)
    detail = inner.one_of("detail", ("auto", "low", "high", "original")) or "auto"
    if detail == "original":
        detail = "high"
    data = _decode(url, inner.at(name))
    return ImagePart(
        data, _kind(data, inner.at(name)), cast(Literal["auto", "low", "high"], detail)
    )


def _decode(url: str, where: str) -> bytes:
    if url[:5].lower() != "data:":
        raise Unsupported(
            f"'{where}': this server fetches no image addresses; send the picture itself as a "
            "data: URL (data:image/png;base64,…).",
            param=where,
        )
    label, comma, written = url[5:].partition(",")
    if not comma or not label.lower().endswith(";base64"):
        raise InvalidRequest(
            f"'{where}' must be a base64 data: URL (data:image/png;base64,…).", param=where
        )
    bounds.IMAGE_BYTES.check(len(written) * 3 // 4, where)
    try:
        return base64.b64decode("".join(written.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"'{where}' is not valid base64.", param=where) from None


def _kind(data: bytes, where: str) -> str:
    for start, kind in _KINDS:
        if data.startswith(start):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    raise InvalidRequest(
        f"'{where}' is not a PNG, JPEG, WebP or GIF picture; convert it to one of these.",
        param=where,
    )
