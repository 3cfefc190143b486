"""Who may use the API: the owner's key, guest keys, and whose budget a caller spends.

The owner's key is APP_API_KEY, or one made at the first start and kept in the runtime folder
(mode 0600). A guest key is stateless: it carries its end and its visitor's address fingerprint
under an HMAC, opens the chat routes only, shares its budget with the anonymous page, and dies with
the process. Keys are compared in constant time and never logged. Knows no HTTP. Used by
openai_compat.py and the page.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from serve.errors import Unauthenticated
from serve.settings import KeyDisplay, Settings

GUEST_SECONDS = 3600
_GUEST = "sk-guest-"
_LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")

Shown = Literal["owner", "guest", "operator", "off"]


@dataclass(frozen=True, slots=True)
class Identity:
    """A caller. `tenant` separates caches and stored answers, `bucket` names the budget spent."""

    kind: Literal["owner", "guest", "page"]
    tenant: str
    bucket: str

    @property
    def is_owner(self) -> bool:
        return self.kind == "owner"


@dataclass(frozen=True, slots=True)
class KeyOffer:
    """What the page may show one visitor. `key` is None for "operator" and "off"."""

    kind: Shown
    key: str | None = None
    expires_in: int | None = None


class KeyRing:
    """Made once at the start. Raises OSError when the runtime folder cannot be written."""

    def __init__(self, settings: Settings) -> None:
        folder = settings.runtime_dir
        self.is_operators = settings.app_api_key is not None
        self._owner_key = settings.app_api_key or _kept(folder / "owner_key", "sk-")
        self._display: KeyDisplay = settings.key_display
        self._is_local = settings.host in _LOOPBACK
        # Survives a restart: what clients hold for us (encrypted reasoning) stays readable.
        self.server_secret = _kept(folder / "server_secret", "").encode()
        self._guest_secret = secrets.token_bytes(32)
        self.owner_token = self._sign("owner link", self._owner_key)[:43]

    @classmethod
    def from_settings(cls, settings: Settings) -> KeyRing:
        return cls(settings)

    def announcement(self, base: str) -> list[str]:
        """The lines that the start prints once: the key if it was made here, and the owner's link
        (a fragment reaches no log and no proxy)."""
        link = f"Owner's page: {base}/#owner={self.owner_token}"
        if self.is_operators:
            return ["API key: the one set as APP_API_KEY", link]
        return [f"API key: {self._owner_key}", link]

    def _sign(self, purpose: str, text: str) -> str:
        digest = hmac.new(self.server_secret, f"{purpose}\0{text}".encode(), hashlib.sha256)
        return base64.urlsafe_b64encode(digest.digest()).decode().rstrip("=")

    def fingerprint(self, text: str) -> str:
        """Names a key or an address without telling it."""
        return self._sign("fingerprint", text)[:16]

    # -- callers -----------------------------------------------------------------------------------

    def identify(self, presented: list[str]) -> Identity:
        """The caller behind any of the presented keys. Raises Unauthenticated."""
        if not presented:
            raise Unauthenticated(
                "This server needs an API key: send 'Authorization: Bearer KEY' or "
                "'X-API-Key: KEY'. The page's API panel shows one."
            )
        for key in presented:
            if _same(key, self._owner_key):
                return Identity("owner", "owner", "owner")
        for key in presented:
            guest = self._read_guest(key)
            if guest is not None:
                return guest
        if any(key.startswith(_GUEST) for key in presented):
            raise Unauthenticated(
                "This guest key has ended or is not from this server; the page's API panel has a "
                "new one."
            )
        raise Unauthenticated("The API key is wrong. The page's API panel shows a right one.")

    def page_identity(self, client_ip: str, session: str = "") -> Identity:
        """An anonymous visitor of the page: the budget of the address, a cache of the session."""
        bucket = "page:" + self.fingerprint(client_ip)
        return Identity("page", f"{bucket}/{self.fingerprint(session)}", bucket)

    # -- guest keys --------------------------------------------------------------------------------

    def guest_key(self, client_ip: str, now: float | None = None) -> str:
        ends = int((time.time() if now is None else now) + GUEST_SECONDS)
        payload = f"{ends:x}.{self.fingerprint(client_ip)}.{secrets.token_hex(4)}"
        return f"{_GUEST}{payload}.{self._seal(payload)}"

    def _read_guest(self, key: str, now: float | None = None) -> Identity | None:
        payload, _, seal = key.removeprefix(_GUEST).rpartition(".")
        if not key.startswith(_GUEST) or not _same(seal, self._seal(payload)):
            return None
        ends, address, nonce = payload.split(".")
        if int(ends, 16) < (time.time() if now is None else now):
            return None
        return Identity("guest", f"guest:{nonce}", f"page:{address}")

    def _seal(self, payload: str) -> str:
        return hmac.new(self._guest_secret, payload.encode(), hashlib.sha256).hexdigest()[:32]

    # -- what the page shows -----------------------------------------------------------------------

    def is_owner_token(self, token: str) -> bool:
        return _same(token, self.owner_token)

    def offer(self, token: str, client_ip: str, is_local_visit: bool) -> KeyOffer:
        """The key for a visitor: `token` is the owner link's (or ""), `is_local_visit` says that
        the request names a loopback host and came through no proxy."""
        if self._display == "off":
            return KeyOffer("off")
        if self._shows_owner_key(token, is_local_visit):
            return KeyOffer("operator") if self.is_operators else KeyOffer("owner", self._owner_key)
        if self.is_operators and self._display != "guest":
            return KeyOffer("operator")
        return KeyOffer("guest", self.guest_key(client_ip), GUEST_SECONDS)

    def is_owner_visit(self, token: str, is_local_visit: bool) -> bool:
        """Whether the page may do for this visitor what the owner may: the link's token, or a page
        that shows the owner's key anyway."""
        shown = self._shows_owner_key(token, is_local_visit) and not self.is_operators
        return self.is_owner_token(token) or (shown and self._display != "off")

    def _shows_owner_key(self, token: str, is_local_visit: bool) -> bool:
        if self.is_owner_token(token) or self._display == "owner":
            return True
        return self._display == "auto" and self._is_local and is_local_visit


def _same(given: str, known: str) -> bool:
    """Constant-time, for any text: headers may hold other than ASCII."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), known.encode())


def _kept(path: Path, prefix: str) -> str:
    """The secret in `path`, made at the first start; only this user may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            kept = path.read_text().strip()
        except FileNotFoundError:
            kept = ""
        if kept:
            path.chmod(0o600)
            return kept
        made = prefix + secrets.token_urlsafe(32)
        draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(made)
        draft.replace(path)
