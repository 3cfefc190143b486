"""An image as a request carries it, as an ImagePart: a data: URL decoded, an address kept as one.

Base64 is checked strictly and the picture's header by serve.pictures; pixels are not decoded and
nothing is fetched here. Used by parts.py.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Literal, cast

from serve import pictures
from serve.errors import InvalidRequest
from serve.values import ImagePart
from serve.wire import bounds
from serve.wire.body import Body

Detail = Literal["auto", "low", "high"]


def read_image(part: Body, name: str) -> ImagePart:
    """`part[name]` is the URL itself (Responses) or an object with url and detail (chat)."""
    inner = part
    if isinstance(part.get(name), dict):
        inner, name = part.required_object(name), "url"
    url, where = inner.required_text(name), inner.at(name)
    asked = inner.one_of("detail", ("auto", "low", "high", "original")) or "auto"
    detail = cast(Detail, "high" if asked == "original" else asked)
    if re.match(r"https?:", url, re.IGNORECASE):
        return ImagePart(b"", detail=detail, url=url, where=where)
    data = _decode(url, where)
    return ImagePart(data, pictures.check(data, where), detail, where=where)


def _decode(url: str, where: str) -> bytes:
    label, comma, written = url[5:].partition(",")
    if url[:5].lower() != "data:" or not comma or not label.lower().endswith(";base64"):
        raise InvalidRequest(
            f"'{where}' must be a base64 data: URL (data:image/png;base64,…) or an http(s) "
            "address.",
            param=where,
        )
    bounds.IMAGE_BYTES.check(len(written) * 3 // 4 - 2, where)
    try:
        return base64.b64decode("".join(written.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"'{where}' is not valid base64.", param=where) from None
