"""An error as OpenAI's clients read it: `{"error": {message, type, param, code}}`, and its headers.

Pure. Used by openai_compat.py for whole answers and by the dialects inside streams.
"""

from __future__ import annotations

import json
import math
from typing import Any

from serve.errors import EngineFailed, ServeError


def envelope(error: ServeError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def headers(error: ServeError) -> dict[str, str]:
    found: dict[str, str] = {}
    if error.retry_after is not None:
        found["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        found["www-authenticate"] = "Bearer"
    if isinstance(error, EngineFailed):
        # The official clients would send a failed request twice more by themselves.
        found["x-should-retry"] = "false"
    return found


def frame(value: Any, event: str | None = None) -> str:
    """One server-sent event holding `value` as JSON."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {encode(value)}\n\n"


# Made once: json.dumps with these options would build an encoder for every token.
_WRITE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

# Line ends to Python's str.splitlines (as some clients split streams), though not to the SSE
# standard.
_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})


def encode(value: Any) -> str:
    """Compact JSON on one line, whatever a client takes for a line end."""
    written = _WRITE(value)
    return written if written.isascii() else written.translate(_LINE_ENDS)
