"""Reasoning that a client carries for us, unreadable to it: authenticated encryption under the
server's own secret.

Bound to the tenant, so that one caller's reasoning opens for nobody else. Made in openai_compat.py
with the key ring's secret.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE_BYTES = 12


class Seal:
    def __init__(self, secret: bytes) -> None:
        self._cipher = AESGCM(hashlib.sha256(b"reasoning\0" + secret).digest())

    def close(self, text: str, tenant: str) -> str:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, text.encode(), tenant.encode())
        return base64.urlsafe_b64encode(sealed).decode()

    def open(self, sealed: str, tenant: str) -> str | None:
        """None for what is not ours, not this tenant's, or damaged."""
        try:
            raw = base64.urlsafe_b64decode(sealed.encode("ascii", "replace"))
            nonce, text = raw[:_NONCE_BYTES], raw[_NONCE_BYTES:]
            return self._cipher.decrypt(nonce, text, tenant.encode()).decode()
        except (binascii.Error, ValueError, InvalidTag):
            return None
