"""Addresses from strangers: only public ones are reached, and every refusal sounds the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve import addresses
from serve.addresses import Address, Fetcher, is_public, parse
from serve.errors import InvalidRequest, ServeError, Unsupported

WHERE = "messages[0].content[1].image_url.url"

BAD = (
    "",
    "ftp://example.com/a.png",
    "file:///etc/passwd",
    "gopher://example.com/",
    "//example.com/a.png",
    "http:/example.com/a.png",
    "http:example.com",
    "http://",
    "http:///a.png",
    "javascript:alert(1)",
    "http://user@example.com/",
    "http://user:secret@example.com/",
    "http://example.com@127.0.0.1/",
    "http://127.0.0.1\\@example.com/",
    "http://example.com\\@127.0.0.1/",
    "http://example.com\\.evil.com/",
    "http://example.com:22/",
    "http://example.com:8080/",
    "http://example.com:080/x y",
    "http://example.com:0/",
    "http://example.com:443000/",
    "http://example.com:-80/",
    "http://example.com:８０/",
    "http://exa mple.com/",
    " http://example.com/",
    "http://example.com/\r\nHost: evil",
    "http://example.com/\nX",
    "http://example.com/\t",
    "http://example.com/\0",
    "http://exämple.com/",
    "http://ⓔxample.com/",
    "http://\u212aelvin.example/",
    "http://127。0。0。1/",
    "http://[::1/",
    "http://::1/",
    "http://[fe80::1%25eth0]/",
    "http://[fe80::1%eth0]/",
    "http://-example.com/",
    "http://example..com/",
    "http://%31%32%37.0.0.1/",
    "http://example.com/" + "a" * 5000,
)

PRIVATE = (
    "0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "127.8.8.8", "169.254.169.254", "172.16.0.1",
    "192.0.0.1", "192.0.2.1", "192.168.1.1", "198.18.0.1", "203.0.113.9", "224.0.0.1",
    "239.255.255.250", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b:1::1", "100::1", "2001:db8::1", "2002:7f00:1::", "2001:0:7f00:1::", "3fff::1",
    "fc00::1", "fd12:3456::1", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1",
    "nonsense", "", "1.2.3", "0x7f.0.0.1",
)  # fmt: skip


@pytest.mark.parametrize("url", BAD)
def test_an_address_that_could_be_read_in_two_ways_is_not_read(url: str) -> None:
    assert parse(url) is None


@pytest.mark.parametrize(
    ("url", "read"),
    [
        ("http://example.com", Address("http", "example.com", 80, "/")),
        ("HTTPS://Example.COM:443/A.png?x=1&y=%20#top",
         Address("https", "example.com", 443, "/A.png?x=1&y=%20")),
        ("https://example.com?x", Address("https", "example.com", 443, "/?x")),
        ("http://93.184.216.34/a", Address("http", "93.184.216.34", 80, "/a")),
        ("http://[2606:2800:220::1]:80/a", Address("http", "2606:2800:220::1", 80, "/a")),
        ("https://a-b.example_c.org./p", Address("https", "a-b.example_c.org.", 443, "/p")),
    ],
)  # fmt: skip
def test_a_plain_address_is_read_once(url: str, read: Address) -> None:
    assert parse(url) == read


@given(st.text(max_size=60))
def test_whatever_follows_the_scheme_is_refused_or_has_a_plain_host(rest: str) -> None:
    read = parse("http://" + rest)
    assert read is None or (read.host.isascii() and "@" not in read.host and read.port in (80, 443))
    assert read is None or not any(c.isspace() for c in read.target)


@pytest.mark.parametrize("ip", PRIVATE)
def test_an_inner_address_is_not_public_whatever_it_is_wrapped_in(ip: str) -> None:
    assert not is_public(ip)


@pytest.mark.parametrize("ip", ["8.8.8.8", "93.184.216.34", "2606:4700::1111"])
def test_an_address_of_the_open_internet_is_public(ip: str) -> None:
    assert is_public(ip)


# ---- fetching, from a server of our own ---------------------------------------------------------

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def refusal(work: Coroutine[Any, Any, object]) -> ServeError:
    with pytest.raises(ServeError) as refused:
        asyncio.run(work)
    assert refused.value.param == WHERE
    return refused.value


def resolves_to(*ips: str) -> addresses.Resolver:
    async def resolver(host: str, port: int) -> list[str]:
        return list(ips)

    return resolver


@asynccontextmanager
async def served(answer: Answer) -> Any:
    """A fetcher that believes the local server to be public."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        yield Fetcher(True, resolves_to("127.0.0.1"), lambda ip: True, lambda _: port)
    finally:
        server.close()


def says(raw: bytes, asked: list[bytes] | None = None) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if asked is not None:
            asked.append(head)
        writer.write(raw)
        await writer.drain()

    return answer


async def fetch(answer: Answer, url: str = "http://pictures.example/a.png?b=1") -> bytes:
    async with served(answer) as fetcher:
        return await fetcher.get(url, WHERE)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\nhello",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    ],
)
def test_a_picture_is_fetched_with_the_name_it_was_asked_by(raw: bytes) -> None:
    asked: list[bytes] = []
    assert asyncio.run(fetch(says(raw, asked))) == b"hello"
    assert asked[0].startswith(b"GET /a.png?b=1 HTTP/1.1\r\nHost: pictures.example\r\n")
    assert b"cookie" not in asked[0].lower() and b"authorization" not in asked[0].lower()


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno",
        b"HTTP/1.1 206 Partial Content\r\nContent-Length: 1\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\nx",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ncut",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (addresses.MAX_BYTES + 1),
    ],
    ids=lambda raw: raw[:40].decode().strip() or "nothing",
)
def test_every_failure_sounds_the_same(raw: bytes) -> None:
    error = refusal(fetch(says(raw)))
    closed = refusal(Fetcher(True, resolves_to("127.0.0.1")).get("http://inner.example/", WHERE))
    assert isinstance(error, InvalidRequest)
    assert error.message == closed.message


@pytest.mark.parametrize("url", BAD[:12])
def test_a_bad_address_is_a_400_that_names_the_part(url: str) -> None:
    error = refusal(Fetcher(True, resolves_to("8.8.8.8")).get(url, WHERE))
    assert (error.status, error.code) == (400, "invalid_value")


@pytest.mark.parametrize("ips", [("8.8.8.8", "10.0.0.1"), ("::ffff:10.0.0.1",), ()])
def test_a_name_with_any_inner_address_is_not_connected_to(
    ips: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connected(*_args: object, **_named: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(asyncio, "open_connection", connected)
    refusal(Fetcher(True, resolves_to(*ips)).get("https://two.example/", WHERE))


def test_the_name_is_resolved_once_and_that_address_is_connected_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    reached: list[object] = []

    async def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["93.184.216.34"] if len(asked) == 1 else ["127.0.0.1"]

    async def connect(host: str, port: int, **options: object) -> None:
        reached.append((host, port, options["server_hostname"]))
        raise ConnectionRefusedError

    monkeypatch.setattr(asyncio, "open_connection", connect)
    refusal(Fetcher(True, rebinding).get("https://Rebind.example./a", WHERE))
    assert asked == ["rebind.example."]
    assert reached == [("93.184.216.34", 443, "rebind.example")]


@pytest.mark.parametrize("host", ["localhost", "127.1", "0x7f000001", "2130706433", "0177.0.0.1"])
def test_other_spellings_of_this_machine_resolve_to_it_and_are_refused(host: str) -> None:
    refusal(Fetcher(True).get(f"http://{host}/", WHERE))


def test_a_server_that_does_not_answer_is_left_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(addresses, "SECONDS", 0.2)

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(100):
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)

    refusal(fetch(drip))


def test_without_the_setting_no_address_is_looked_at() -> None:
    async def resolver(host: str, port: int) -> list[str]:
        raise AssertionError("the name was resolved")

    error = refusal(Fetcher(False, resolver).get("https://example.com/a.png", WHERE))
    assert isinstance(error, Unsupported) and "ALLOW_IMAGE_URLS" in error.message
