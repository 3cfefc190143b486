"""Files are what their bytes say; none of them can stop a message."""

from __future__ import annotations

import io

import pypdf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from serve.ui.attachments import MAX_BYTES, MAX_CHARACTERS, read
from serve.values import ImagePart, TextPart


def pdf(text: str) -> bytes:
    """A PDF of one page that says `text` in a standard font."""
    writer = pypdf.PdfWriter()
    page = writer.add_blank_page(300, 300)
    names = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    font = DictionaryObject({NameObject(k): NameObject(v) for k, v in names.items()})
    fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    stream = DecodedStreamObject()
    stream.set_data(f"BT /F1 12 Tf 20 200 Td ({text}) Tj ET".encode())
    page[NameObject("/Contents")] = writer._add_object(stream)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain\ttext\n", "plain\ttext\n"),
        ("中文".encode(), "中文"),
        ("中文".encode("gb18030"), "中文"),
        ("中文".encode("utf-16"), "中文"),
        (b"\xef\xbb\xbfwith mark", "with mark"),
    ],
)
def test_text_is_read_whatever_its_encoding(data: bytes, text: str) -> None:
    read_file = read("a.bin", data)
    assert (read_file.kind, read_file.text) == ("text", text)
    assert read_file.part() == TextPart(f"[a.bin]\n{text}\n[/a.bin]\n\n")


@pytest.mark.parametrize(
    ("data", "media_type"),
    [
        (b"\x89PNG\r\n\x1a\n....", "image/png"),
        (b"\xff\xd8\xff\xe0....", "image/jpeg"),
        (b"GIF89a....", "image/gif"),
        (b"RIFF....WEBPVP8 ", "image/webp"),
    ],
)
def test_a_picture_is_known_by_its_bytes_not_by_its_name(data: bytes, media_type: str) -> None:
    assert read("report.txt", data).part() == ImagePart(data, media_type)


def test_a_pdf_is_read_as_its_text() -> None:
    found = read("a.pdf", pdf("The secret word is plum."))
    assert (found.kind, found.pages) == ("pdf", 1)
    assert "The secret word is plum." in found.text


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (b"\x7fELF\x02\x01\x01\0\0", "file_not_readable"),
        (b"%PDF-1.7 and then nonsense", "file_not_readable"),
        (pdf(""), "file_has_no_text"),
        (b"  \n", "file_has_no_text"),
        (b"x" * (MAX_BYTES + 1), "file_too_large"),
    ],
    ids=["binary", "broken pdf", "empty pdf", "blank", "large"],
)
def test_a_file_that_cannot_be_read_is_a_note(data: bytes, note: str) -> None:
    found = read("a", data)
    assert (found.kind, found.note, found.part()) == ("unreadable", note, None)


def test_a_long_text_is_cut_and_says_so() -> None:
    found = read("a", b"x" * (MAX_CHARACTERS + 1))
    assert len(found.text) == MAX_CHARACTERS and found.note == "file_cut"


@given(st.binary(max_size=300), st.sampled_from([b"", b"%PDF-1.4\n", b"\xff\xfe", b"RIFF"]))
def test_no_bytes_raise(data: bytes, head: bytes) -> None:
    assert read("a", head + data).record()["name"] == "a"
