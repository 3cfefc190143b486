"""What the OpenAPI description says of each operation: body, answers, errors, key.

Made from the tables of fields, so that it cannot say anything else than what is checked. Used by
openai_compat.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve.wire.fields import Field, schema

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERRORS = {
    "400": "a field is wrong or not supported; `param` names it",
    "401": "no key, a wrong or an expired one",
    "403": "the key may not do this",
    "404": "no such model, response or route",
    "413": "the body is too large",
    "429": "a budget is spent or the queue is full; Retry-After says how long to wait",
    "500": "something broke here",
    "503": "the model is loading or the server is stopping; Retry-After says how long to wait",
}


def operation(path: str, is_locked: bool, fields: Sequence[Field]) -> dict[str, Any]:
    """The `openapi_extra` of one route."""
    answers: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if fields:
        answers["text/event-stream"] = {"schema": {"type": "string"}}
    responses: dict[str, Any] = {"200": {"description": "the answer", "content": answers}}
    if path.startswith("/v1"):
        error = {"application/json": {"schema": _ERROR}}
        responses |= {
            status: {"description": text, "content": error} for status, text in _ERRORS.items()
        }
    found: dict[str, Any] = {"responses": responses}
    if is_locked:
        found["parameters"] = [
            {"name": "X-API-Key", "in": "header", "schema": {"type": "string"}},
        ]
    if fields:
        content = {"application/json": {"schema": schema(fields)}}
        found["requestBody"] = {"required": True, "content": content}
    return found
