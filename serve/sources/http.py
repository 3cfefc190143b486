"""HTTP as the sources use it: short time-outs, and every failure in plain words.

Knows no hub. Used by the hubs for their listings and by the downloader for its bytes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx

from serve.sources.offer import SourceFailed, Unreachable

CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 10.0
ANSWER_SECONDS = 10.0
ANSWER_BYTES = 64 * 2**20


class Broken(Unreachable):
    """It answers, but not well now: asking again may help."""


def create_client() -> httpx.Client:
    """Redirects are followed (their credentials are not); a proxy in the environment is used."""
    return httpx.Client(
        follow_redirects=True,
        max_redirects=8,
        limits=httpx.Limits(max_keepalive_connections=0),  # few, long requests: nothing to keep
        timeout=httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS, pool=None),
        headers={"User-Agent": "gpt-oss-app", "Accept-Encoding": "identity"},
    )


def get_json(
    client: httpx.Client, url: str, source: str, what: str, headers: Mapping[str, str] | None = None
) -> Any:
    """The JSON at `url`, read within ANSWER_SECONDS. Raises SourceFailed or Unreachable."""
    body = get_bytes(client, url, source, what, headers)
    try:
        return json.loads(body)
    except ValueError:
        kind = "a web page" if body.lstrip()[:1] == b"<" else "something that is not JSON"
        raise Unreachable(
            f"{source} answered with {kind} instead of data", "Check its address, or try later."
        ) from None


def get_bytes(
    client: httpx.Client, url: str, source: str, what: str, headers: Mapping[str, str] | None = None
) -> bytes:
    """What `url` holds; an answer that breaks off or says "busy" is asked for again, twice."""
    for pause in (0.2, 0.6):
        try:
            return _get_once(client, url, source, what, headers)
        except Broken:
            time.sleep(pause)
    return _get_once(client, url, source, what, headers)


def _get_once(
    client: httpx.Client, url: str, source: str, what: str, headers: Mapping[str, str] | None = None
) -> bytes:
    end = time.monotonic() + ANSWER_SECONDS
    body = bytearray()
    try:
        with client.stream("GET", url, headers=dict(headers or {})) as response:
            check_status(response, source, what)
            for chunk in response.iter_bytes():
                body += chunk
                if time.monotonic() > end or len(body) > ANSWER_BYTES:
                    raise Unreachable(f"{source} takes too long to answer", "Try later.")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise unreachable(source, error) from error
    return bytes(body)


def check_status(response: httpx.Response, source: str, what: str) -> None:
    status = response.status_code
    if status in (401, 403):
        raise SourceFailed(
            f"{source} does not give {what} without permission ({status})",
            f"Accept the model's terms at {source} and set its token, or name another model.",
        )
    if status == 404:
        raise SourceFailed(f"{source} has no {what}", "Check the spelling of the id.")
    if status == 429 or status >= 500:
        raise Broken(f"{source} is not serving now ({status})", "Try later.")
    if status >= 400:
        raise SourceFailed(f"{source} refused to give {what} ({status})", "Check its address.")


def unreachable(source: str, error: Exception) -> Unreachable:
    if isinstance(error, httpx.TimeoutException):
        return Unreachable(f"{source} does not answer", "Check this machine's network.")
    if isinstance(error, httpx.TooManyRedirects):
        return Unreachable(
            f"{source} sends requests in circles (redirect loop)", "Check its address."
        )
    if isinstance(error, httpx.ConnectError | httpx.ProxyError | httpx.InvalidURL):
        return Unreachable(f"{source} cannot be reached from here", "Check this machine's network.")
    return Broken(f"{source} broke off the answer ({type(error).__name__})", "Try later.")


def is_answering(client: httpx.Client, url: str) -> bool:
    """True when a server that is not failing answers at `url` at all."""
    try:
        return client.head(url, follow_redirects=False).status_code < 500
    except httpx.HTTPError:
        return False


def host_of(url: str) -> str:
    return urlsplit(url).hostname or url
