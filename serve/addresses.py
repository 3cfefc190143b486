"""Fetching a picture from an address that a request names, without being led astray.

An address is taken apart once, here; its name is resolved once, every address it stands for must
be public, and the connection goes to that very address. No redirects, no proxies, ports 80 and 443
only, one deadline, one size limit. Whatever goes wrong gives the same answer, so that nobody can
map a network by asking; the reason goes to the log. Knows no pixels. Used by openai_compat.py.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import h11

from serve.errors import InvalidRequest, Unsupported

log = logging.getLogger(__name__)

SECONDS = 10.0
MAX_BYTES = 20 * 1024 * 1024
AT_ONCE = 4

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

_NAME = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_ADDRESS = re.compile(
    rf"(?P<scheme>https?)://(?P<host>(?:{_NAME}\.)*{_NAME}\.?|\[[0-9a-f:.]+\])(?::(?P<port>\d{{1,5}}))?"
    r"(?P<path>/[!$-;=?-\[\]_a-z~]*|\?[!$-;=?-\[\]_a-z~]*)?(?:#[!-~]*)?",
    re.IGNORECASE | re.ASCII,
)
_GLOBAL_6 = ipaddress.ip_network("2000::/3")
_EXAMPLES_6 = ipaddress.ip_network("3fff::/20")  # RFC 9637, younger than Python 3.11's table


class _Refused(Exception):
    """Why nothing was fetched; for the log only."""


@dataclass(frozen=True, slots=True)
class Address:
    scheme: str
    host: str
    port: int
    target: str

    @property
    def host_header(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def parse(url: str) -> Address | None:
    """The one reading of an address; None for what is not plain http(s) on port 80 or 443.

    Refused, not repaired: user names, backslashes, spaces, control and non-ASCII characters.
    """
    found = _ADDRESS.fullmatch(url) if len(url) <= 4096 else None
    if found is None:
        return None
    scheme = found["scheme"].lower()
    port = int(found["port"] or (443 if scheme == "https" else 80))
    if port not in (80, 443):
        return None
    target = found["path"] or "/"
    host = found["host"].lower().strip("[]")
    return Address(scheme, host, port, target if target.startswith("/") else "/" + target)


def is_public(text: str) -> bool:
    """Whether an IP address is one of the open internet's, whatever it is wrapped in."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        # All that wraps an IPv4 address (mapped, NAT64) lies outside 2000::/3, save these two.
        if address not in _GLOBAL_6 or address in _EXAMPLES_6:
            return False
        if address.sixtofour or address.teredo or address.scope_id:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved)


async def resolve(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)
    return [str(entry[4][0]) for entry in found]


@dataclass
class Fetcher:
    """Gets pictures for requests. `allowed` False refuses every address with what to set.

    `resolver`, `may_reach` and `connect_port` are for tests, which have no internet.
    """

    allowed: bool
    resolver: Resolver = resolve
    may_reach: Callable[[str], bool] = is_public
    connect_port: Callable[[int], int] = int
    _turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))

    async def get(self, url: str, where: str) -> bytes:
        """The body behind `url`; `where` names the request's field in errors.

        Raises Unsupported (not allowed here) or InvalidRequest (anything else).
        """
        if not self.allowed:
            raise Unsupported(
                f"'{where}': this server fetches no image addresses (ALLOW_IMAGE_URLS is off); "
                "send the picture itself as a data: URL (data:image/png;base64,…).",
                param=where,
            )
        try:
            async with self._turns, asyncio.timeout(SECONDS):
                return await self._get(url)
        except (_Refused, OSError, EOFError, h11.ProtocolError, UnicodeError) as wrong:
            log.info("No picture from an address: %s: %s", type(wrong).__name__, wrong)
            raise InvalidRequest(
                f"'{where}': no picture could be fetched. The address must be public, http or "
                f"https on port 80 or 443, and answer directly (no redirect) within {SECONDS:g} s "
                f"with at most {MAX_BYTES // 2**20} MB.",
                param=where,
            ) from None

    async def _get(self, url: str) -> bytes:
        address = parse(url)
        if address is None:
            raise _Refused("not an address that is fetched")
        async with self._connection(address) as (reader, writer):
            return await _exchange(address, reader, writer)

    @asynccontextmanager
    async def _connection(
        self, address: Address
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        found = await self.resolver(address.host, address.port)
        closed = [ip for ip in found if not self.may_reach(ip)]
        if closed or not found:
            raise _Refused(f"{address.host} is not public: {', '.join(closed) or 'no address'}")
        secure = address.scheme == "https"
        reader, writer = await asyncio.open_connection(
            found[0],
            self.connect_port(address.port),
            ssl=ssl.create_default_context() if secure else None,
            server_hostname=address.host.rstrip(".") if secure else None,
        )
        try:
            yield reader, writer
        finally:
            writer.close()


async def _exchange(
    address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bytes:
    connection = h11.Connection(h11.CLIENT)
    request = h11.Request(
        method="GET",
        target=address.target,
        headers=[
            ("Host", address.host_header),
            ("Accept", "image/png, image/jpeg, image/webp, image/gif"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ],
    )
    writer.write(connection.send(request) + connection.send(h11.EndOfMessage()))
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Response):
            _check(event)
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_BYTES:
                raise _Refused("too many bytes")
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)
        elif not isinstance(event, h11.InformationalResponse):
            raise _Refused("the connection ended early")


def _check(response: h11.Response) -> None:
    if response.status_code != 200:
        raise _Refused(f"status {response.status_code}")
    headers = dict(response.headers.raw_items())
    named = {bytes(name).lower(): bytes(value) for name, value in headers.items()}
    if named.get(b"content-encoding", b"identity").lower() != b"identity":
        raise _Refused("a compressed answer")
    length = named.get(b"content-length", b"0")
    if length.isdigit() and int(length) > MAX_BYTES:
        raise _Refused("too many bytes announced")
