"""A picture as bytes: which kind it is, how large it says it is, and its pixels.

The kind is read from the first bytes and the size from the header, before any decoder runs; only
PNG, JPEG, WebP and GIF are decoded, only their first frame, and only up to MAX_PIXELS. Whatever is
wrong becomes an InvalidRequest that names the part and says nothing of the decoder's own words.
Knows no HTTP, no torch. Called by the wire and the page (check) and by formats/images.py (decode).
"""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from collections.abc import Sequence
from io import BytesIO

from PIL import Image, ImageOps

from serve.errors import InvalidRequest
from serve.values import ImagePart

log = logging.getLogger(__name__)

MAX_PIXELS = 50_000_000
MAX_BYTES = 20 * 1024 * 1024
MAX_IMAGES = 16
MAX_PIXELS_TOGETHER = 100_000_000

_FORMATS = {
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/webp": "WEBP",
    "image/gif": "GIF",
}
# What Pillow raises for bad bytes, found by feeding it broken files (tests/test_pictures.py).
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    MemoryError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


def check(data: bytes, where: str) -> str:
    """The media type of a picture whose header is in bounds; `where` names it in errors.

    Reads the header only. Raises InvalidRequest.
    """
    if len(data) > MAX_BYTES:
        raise InvalidRequest(
            f"'{where}' has {len(data):,} bytes; a picture may have {MAX_BYTES:,}.", param=where
        )
    kind = media_type(data)
    if kind is None:
        raise InvalidRequest(
            f"'{where}' is not a PNG, JPEG, WebP or GIF picture; convert it to one of these.",
            param=where,
        )
    size = header_size(data)
    if size is None or 0 in size:
        raise _unreadable(where)
    _check_pixels(size, where)
    return kind


def check_together(parts: Sequence[ImagePart]) -> None:
    """The pictures of one request, which are in memory at the same time. Raises InvalidRequest
    naming the first that is too much."""
    total = 0
    for number, part in enumerate(parts):
        width, height = header_size(part.data) or (0, 0)
        total += width * height
        if number < MAX_IMAGES and total <= MAX_PIXELS_TOGETHER:
            continue
        raise InvalidRequest(
            f"'{part.where or 'messages'}': a request may have {MAX_IMAGES} pictures and "
            f"{MAX_PIXELS_TOGETHER // 1_000_000} megapixels together, those of earlier turns "
            "included. Leave out older ones, or send smaller ones.",
            param=part.where or "messages",
        )


def media_type(data: bytes) -> str | None:
    """Told from the first bytes, never from a label; None for anything not decoded here."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    return None


def header_size(data: bytes) -> tuple[int, int] | None:
    """Width and height in pixels as the header says; None if it does not."""
    read = {
        "image/png": _png_size,
        "image/jpeg": _jpeg_size,
        "image/gif": _gif_size,
        "image/webp": _webp_size,
    }.get(media_type(data) or "")
    if read is None:
        return None
    try:
        return read(data)
    except (struct.error, IndexError):
        return None


def decode(part: ImagePart) -> Image.Image:
    """The first frame in RGB, turned upright, transparency over white. Raises InvalidRequest.

    `detail` "low" shrinks it to fit 512 x 512, so that it costs few tokens.
    """
    where = part.where or "image"
    kind = check(part.data, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(part, _FORMATS[kind], where)
    except _BROKEN as wrong:
        log.info("A picture could not be decoded: %s: %s", type(wrong).__name__, wrong)
        raise _unreadable(where) from None


def _decode(part: ImagePart, kind: str, where: str) -> Image.Image:
    with Image.open(BytesIO(part.data), formats=(kind,)) as opened:
        # A GIF's first frame may be larger than its screen: Pillow learns that on opening.
        _check_pixels(opened.size, where)
        if part.detail == "low":
            opened.draft("RGB", (512, 512))
        opened.load()
        picture = _over_white(_upright(opened))
    if part.detail == "low":
        picture.thumbnail((512, 512))
    return picture


def _upright(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF says; a camera's damaged EXIF is no reason to refuse its picture."""
    try:
        return ImageOps.exif_transpose(picture)
    except _BROKEN as wrong:
        log.info("Unreadable EXIF, ignored: %s", type(wrong).__name__)
        return picture


def _over_white(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "I;16", "I;16B"):  # convert() would cut at 255 instead of scaling
        picture = picture.point(lambda level: level / 256).convert("L")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layers = picture.convert("RGBA")
    white = Image.new("RGBA", layers.size, "white")
    return Image.alpha_composite(white, layers).convert("RGB")


def _check_pixels(size: tuple[int, int], where: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise InvalidRequest(
            f"'{where}' is {size[0]} x {size[1]} pixels; a picture may have "
            f"{MAX_PIXELS // 1_000_000} megapixels. Send a smaller one.",
            param=where,
        )


def _unreadable(where: str) -> InvalidRequest:
    return InvalidRequest(
        f"'{where}' cannot be read as a picture; the file is damaged or cut short.", param=where
    )


def _png_size(data: bytes) -> tuple[int, int] | None:
    if data[12:16] != b"IHDR":
        return None
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def _gif_size(data: bytes) -> tuple[int, int] | None:
    width, height = struct.unpack_from("<HH", data, 6)
    return width, height


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """From the first start-of-frame segment; segments before it are stepped over."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in (0x01, *range(0xD0, 0xD8)):  # markers without a length
            at += 2
        elif marker in (0xD9, 0xDA):
            return None
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        else:
            at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, 24)
        return 1 + (low_w | high_w << 16), 1 + (low_h | high_h << 16)
    if kind == b"VP8L" and data[20] == 0x2F:
        (bits,) = struct.unpack_from("<I", data, 21)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None
