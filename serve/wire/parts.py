"""Message content as clients write it (a string, null, or typed parts of either dialect) as Parts.

Both dialects' part types are read everywhere, because real clients mix them. Used by messages.py
and items.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from serve.errors import InvalidRequest, Unsupported
from serve.values import ImagePart, Message, Part, ReasoningPart, TextPart
from serve.wire import bounds
from serve.wire.body import Body, shown
from serve.wire.images import read_image

_TEXTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "summary_text": "text",
    "refusal": "refusal",
}
_THOUGHTS = {"thinking": "thinking", "reasoning": "text", "reasoning_text": "text"}
_IMAGES = {"image_url": "image_url", "input_image": "image_url"}


def read_content(owner: Body, name: str) -> tuple[Part, ...]:
    """`owner[name]`: a string, null, or an array of parts (each an object or a plain string)."""
    value = owner.get(name)
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (TextPart(value),)
    if not isinstance(value, list):
        raise owner.wrong(name, "a string or an array of content parts")
    bounds.PARTS.check(len(value), owner.at(name))
    return tuple(
        _part(item, f"{owner.at(name)}[{i}]", owner.ignored) for i, item in enumerate(value)
    )


def _part(item: object, where: str, ignored: list[str]) -> Part:
    if isinstance(item, str):
        return TextPart(item)
    if not isinstance(item, dict):
        raise InvalidRequest(f"'{where}' must be an object, not {shown(item)}.", param=where)
    part = Body(item, where, ignored)
    kind = part.text("type") or ("text" if part.has("text") else "")
    if kind in _TEXTS:
        return TextPart(part.text(_TEXTS[kind]) or "")
    if kind in _THOUGHTS:
        return ReasoningPart(part.text(_THOUGHTS[kind]) or "")
    if kind in _IMAGES:
        if not part.has("image_url") and part.has("file_id"):
            raise Unsupported(
                f"'{where}.file_id': there is no file store here; send a data: URL.", param=where
            )
        return read_image(part, "image_url")
    raise Unsupported(
        f"'{where}': content of type {kind!r} is not supported; send text or image parts.",
        param=where,
    )


DROPPED = "[A picture was here; the model that answers cannot see it.]"


def without_pictures(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The same with each picture told in words."""
    return tuple(
        replace(
            message,
            parts=tuple(
                TextPart(DROPPED) if isinstance(part, ImagePart) else part for part in message.parts
            ),
        )
        for message in messages
    )


def with_pictures(
    messages: Sequence[Message], found: Mapping[ImagePart, ImagePart]
) -> tuple[Message, ...]:
    """The same with each picture that is a key of `found` replaced."""
    return tuple(
        replace(
            message,
            parts=tuple(
                found.get(part, part) if isinstance(part, ImagePart) else part
                for part in message.parts
            ),
        )
        for message in messages
    )
