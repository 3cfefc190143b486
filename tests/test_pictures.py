"""Pictures from strangers: every broken, huge or lying file is a 400 that names the part."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from serve import pictures
from serve.errors import InvalidRequest
from serve.values import ImagePart

WHERE = "messages[0].content[1].image_url.url"
KINDS = ("PNG", "JPEG", "WEBP", "GIF")


def drawn(size: tuple[int, int] = (64, 40), mode: str = "RGB") -> Image.Image:
    picture = Image.new("RGB", size, (250, 240, 230))
    pen = ImageDraw.Draw(picture)
    pen.ellipse((0, 0, size[0] // 2, size[1] - 1), fill=(200, 30, 40))
    pen.line((0, 0, *size), fill=(10, 20, 200), width=3)
    return picture.convert(mode)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def part(data: bytes, detail: str = "auto") -> ImagePart:
    return ImagePart(data, detail=detail, where=WHERE)  # type: ignore[arg-type]


def png(width: int, height: int, body: bytes) -> bytes:
    """A PNG whose header says `width` x `height` grey pixels and whose data is `body`."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def gif_with_a_frame_larger_than_its_screen() -> bytes:
    data = bytearray(encoded(drawn((8, 8), "P"), "GIF"))
    at = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    struct.pack_into("<HH", data, at + 5, 20_000, 20_000)
    return bytes(data)


BAD = {
    "nothing": b"",
    "text": b"Just some words, no picture at all.",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><circle r="4"/></svg>',
    "html": b"<!doctype html><script>alert(1)</script>",
    "pdf": b"%PDF-1.7\n1 0 obj\n",
    "bmp": encoded(drawn(), "BMP"),
    "tiff": encoded(drawn(), "TIFF"),
    "ico": encoded(drawn((32, 32)), "ICO"),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "a png signature and no more": b"\x89PNG\r\n\x1a\n",
    "a jpeg signature and no more": b"\xff\xd8\xff\xe0",
    "a gif signature and no more": b"GIF89a",
    "a webp signature and no more": b"RIFF\x10\0\0\0WEBPVP8 ",
    "an empty png": png(0, 0, zlib.compress(b"")),
    "a bomb: 60,000 x 60,000 in a few bytes": png(60_000, 60_000, zlib.compress(b"\0" * 9)),
    "a header that says less than there is": png(2, 2, zlib.compress(b"\0" * 40_000_000))[:40]
    + b"x",
    "a header that says more than there is": png(4_000, 4_000, zlib.compress(b"\0\0")),
    "a png whose data is no zlib": png(9, 9, b"not compressed"),
    "a gif frame larger than its screen": gif_with_a_frame_larger_than_its_screen(),
    "a jpeg that says it is huge": encoded(drawn(), "JPEG").replace(
        struct.pack(">HH", 40, 64), struct.pack(">HH", 65_500, 65_500), 1
    ),
    **{f"{kind} cut in half": encoded(drawn((300, 300)), kind)[:700] for kind in KINDS},
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_a_bad_file_is_refused_naming_the_part_and_nothing_of_the_decoder(data: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        pictures.decode(part(data))
    error = refused.value
    assert (error.status, error.param) == (400, WHERE)
    assert WHERE in error.message
    for inside in ("0x", "PIL", "Traceback", "BytesIO", "zlib", "libjpeg", "/"):
        assert inside not in error.message.replace(WHERE, "")


@pytest.mark.parametrize("name", [name for name in BAD if "huge" in name or "bomb" in name])
def test_a_bomb_is_refused_by_its_header_before_memory_is_taken(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match="megapixels"):
            pictures.check(BAD[name], WHERE)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (64, 40), (333, 517)])
def test_the_header_is_read_as_pillow_reads_it(kind: str, size: tuple[int, int]) -> None:
    for options in ({}, {"lossless": True}, {"progressive": True, "exif": b"Exif\0\0" + b"\0" * 9}):
        data = encoded(drawn(size), kind, **options)
        assert pictures.header_size(data) == size
        assert pictures.check(data, WHERE) == f"image/{kind.lower()}"
        assert pictures.decode(part(data)).size == size


def test_a_webp_with_transparency_tells_its_canvas() -> None:
    data = encoded(drawn((77, 31), "RGBA"), "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0")
    assert data[12:16] == b"VP8X"
    assert pictures.header_size(data) == (77, 31)


@pytest.mark.parametrize("kind", ("PNG", "GIF"))
def test_pixels_of_lossless_kinds_come_back_exactly(kind: str) -> None:
    picture = drawn(mode="P" if kind == "GIF" else "RGB")
    assert pictures.decode(part(encoded(picture, kind))).tobytes() == (
        picture.convert("RGB").tobytes()
    )


def test_only_the_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert pictures.decode(part(data)).getpixel((8, 8)) == (255, 0, 0)


def test_transparent_pixels_are_white() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert pictures.decode(part(encoded(clear, "PNG"))).getpixel((4, 4)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    data = encoded(palette, "PNG", transparency=3)
    assert pictures.decode(part(data)).getpixel((4, 4)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_cut() -> None:
    grey = Image.frombytes("I;16", (2, 1), struct.pack("<HH", 0x8000, 0xFFFF))
    read = pictures.decode(part(encoded(grey, "PNG")))
    assert [read.getpixel((x, 0)) for x in (0, 1)] == [(128,) * 3, (255,) * 3]


def test_a_photo_is_turned_upright_and_bad_exif_is_no_reason_to_refuse() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(drawn((60, 20)), "JPEG", exif=exif.tobytes())
    assert pictures.decode(part(turned)).size == (20, 60)
    damaged = encoded(drawn((60, 20)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xff" * 40)
    assert pictures.decode(part(damaged)).size == (60, 20)


def test_low_detail_fits_512_pixels_and_never_grows() -> None:
    for kind in KINDS:
        large = encoded(drawn((1600, 800)), kind)
        assert pictures.decode(part(large, "low")).size == (512, 256)
    assert pictures.decode(part(encoded(drawn(), "PNG"), "low")).size == (64, 40)


def test_too_many_bytes_are_refused_before_they_are_looked_at() -> None:
    data = encoded(drawn(), "PNG") + b"\0" * pictures.MAX_BYTES
    with pytest.raises(InvalidRequest, match="bytes"):
        pictures.check(data, WHERE)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10**9), hits=st.integers(1, 12))
def test_a_damaged_file_gives_pixels_or_a_400_and_nothing_else(
    kind: str, seed: int, hits: int
) -> None:
    chance = random.Random(seed)
    data = bytearray(encoded(drawn((96, 64), "P" if kind == "GIF" else "RGB"), kind))
    for _ in range(hits):
        if data and chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        elif chance.random() < 0.3:
            at = chance.randrange(len(data) + 1)
            data[at:at] = chance.randbytes(chance.randrange(1, 9))
        if data:
            at = chance.randrange(min(len(data), 120) if chance.random() < 0.6 else len(data))
            data[at] = chance.choice((0, 0xFF, chance.randrange(256)))
    try:
        assert pictures.decode(part(bytes(data))).mode == "RGB"
    except InvalidRequest as refused:
        assert refused.param == WHERE


SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF\0\0\0\0WEBP")


@settings(max_examples=200, deadline=None)
@given(start=st.sampled_from(SIGNATURES), rest=st.binary(max_size=200))
def test_any_bytes_behind_a_signature_are_read_or_refused(start: bytes, rest: bytes) -> None:
    try:
        assert pictures.decode(part(start + rest)).mode == "RGB"
    except InvalidRequest as refused:
        assert refused.param == WHERE


def test_together_they_may_be_so_many_and_so_large() -> None:
    small, large = encoded(drawn((8, 8)), "PNG"), png(6_000, 6_000, b"")
    pictures.check_together([ImagePart(small)] * pictures.MAX_IMAGES)
    pictures.check_together([ImagePart(large)] * 2)
    named = [ImagePart(small, where=f"part {i}") for i in range(pictures.MAX_IMAGES + 2)]
    with pytest.raises(InvalidRequest) as many:
        pictures.check_together(named)
    assert many.value.param == f"part {pictures.MAX_IMAGES}"
    with pytest.raises(InvalidRequest) as much:
        pictures.check_together([ImagePart(large, where=f"part {i}") for i in range(4)])
    assert much.value.param == "part 2" and "megapixels" in much.value.message
