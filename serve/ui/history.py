"""Messages of the OpenAI and Gradio shapes, as gradio_client users write them, turned into ours.

{"role", "content"} where content is a text or a list of {"type": "text" | "image_url"} parts, and
the {"text", "files"} of a multimodal box. Pure; a refusal names the field. Used by endpoints.py.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from serve.errors import InvalidRequest
from serve.ui.attachments import image_type
from serve.values import ImagePart, Message, Part, TextPart

ROLES = ("system", "developer", "user", "assistant")


def message_from(given: Any, place: str) -> Message:
    """One earlier message. `place` is how an error names it, such as "history[2]"."""
    if not isinstance(given, Mapping):
        raise InvalidRequest(f'{place} must be {{"role": …, "content": …}}.', param="history")
    role = given.get("role")
    if role not in ROLES:
        raise InvalidRequest(f"{place}: role must be one of {', '.join(ROLES)}.", param="history")
    return Message(role, tuple(_parts(given.get("content"), place)))


def spoken(message: Any) -> tuple[str, list[Any]]:
    """The text and the files of `message`: a string, or {"text": …, "files": […]}."""
    if isinstance(message, str):
        return message, []
    if isinstance(message, Mapping) and isinstance(message.get("text", ""), str):
        return message.get("text", ""), list(message.get("files") or [])
    raise InvalidRequest('message must be a text or {"text": …, "files": […]}.', param="message")


def _parts(content: Any, place: str) -> list[Part]:
    if content is None:
        return []
    if isinstance(content, str):
        return [TextPart(content)]
    if not isinstance(content, list):
        raise InvalidRequest(f"{place}: content must be a text or a list.", param="history")
    return [_part(part, place) for part in content]


def _part(part: Any, place: str) -> Part:
    if isinstance(part, str):
        return TextPart(part)
    if isinstance(part, Mapping) and part.get("type") in ("text", "input_text"):
        return TextPart(str(part.get("text") or ""))
    if isinstance(part, Mapping) and part.get("type") == "image_url":
        return _picture(part.get("image_url"), place)
    raise InvalidRequest(f"{place}: parts are text or image_url.", param="history")


def _picture(given: Any, place: str) -> ImagePart:
    address = given.get("url") if isinstance(given, Mapping) else given
    head, comma, body = str(address or "").partition(",")
    try:
        data = base64.b64decode(body, validate=True) if comma and "base64" in head else b""
    except binascii.Error:
        data = b""
    media_type = image_type(data)
    if not media_type:
        raise InvalidRequest(
            f"{place}: image_url must be a data: address of a PNG, JPEG, GIF or WebP.",
            param="history",
        )
    return ImagePart(data, media_type)
