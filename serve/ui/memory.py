"""What one open page has said so far, so that a turn need not carry the whole conversation.

A cache, not a record: the conversation lives in the reader's browser, as a tree (an edit or a
retry is a sibling). Nodes are looked up by id; what is missing (the server was restarted, the
memory was full) is asked of the browser again. Dies with the page's session. Knows no widgets.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from serve.errors import InvalidRequest
from serve.ui.attachments import MAX_BYTES, file_text, image_type
from serve.values import ImagePart, Message, Part, TextPart

MAX_NODES = 4000
MAX_WEIGHT = 48_000_000  # characters and image bytes of one page


@dataclass(frozen=True, slots=True)
class Node:
    """One message of the tree. `parent` is "" for a conversation's first message."""

    id: str
    parent: str
    role: Literal["user", "assistant"]
    parts: tuple[Part, ...]

    @property
    def weight(self) -> int:
        return sum(
            len(p.data) if isinstance(p, ImagePart) else len(p.text)
            for p in self.parts
            if isinstance(p, ImagePart | TextPart)
        )


class Memory:
    """Nodes of one session. `remember` makes room by forgetting everything: a miss costs one more
    request, a wrong half of a conversation would cost an answer."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self._weight = 0

    def remember(self, node: Node) -> None:
        old = self._nodes.pop(node.id, None)
        self._weight += node.weight - (old.weight if old else 0)
        if len(self._nodes) >= MAX_NODES or self._weight > MAX_WEIGHT:
            self._nodes.clear()
            self._weight = node.weight
        self._nodes[node.id] = node

    def node(self, node_id: str) -> Node | None:
        return self._nodes.get(node_id)

    def path(self, node_id: str) -> list[Node] | None:
        """From the conversation's first message to `node_id`; None when any of it is unknown."""
        path: list[Node] = []
        seen: set[str] = set()
        while node_id:
            node = self._nodes.get(node_id)
            if node is None or node_id in seen:
                return None
            seen.add(node_id)
            path.append(node)
            node_id = node.parent
        return path[::-1]


def messages(path: Iterable[Node], system: str = "") -> list[Message]:
    """The conversation for the model; empty answers (failed before a word) are left out."""
    said = [Message(node.role, node.parts) for node in path if node.parts or node.role == "user"]
    return [Message("system", (TextPart(system),)), *said] if system.strip() else said


def node_from(given: Mapping[str, Any]) -> Node:
    """A node as the browser sends it: {id, parent, role, text, files: [{name, kind, text, data}]}.

    Raises InvalidRequest. `data` is base64 of a picture.
    """
    role = given.get("role")
    if role not in ("user", "assistant"):
        raise InvalidRequest("A message's role must be user or assistant.", param="history")
    parts = [*file_parts(given.get("files") or ())]
    if text := str(given.get("text") or ""):
        parts.append(TextPart(text))
    return Node(str(given.get("id") or ""), str(given.get("parent") or ""), role, tuple(parts))


def file_parts(files: Iterable[Mapping[str, Any]]) -> Iterable[Part]:
    for file in files:
        if file.get("kind") == "image":
            yield _picture(str(file.get("data") or ""))
        elif text := str(file.get("text") or ""):
            yield file_text(str(file.get("name") or "file"), text)


def _picture(encoded: str) -> ImagePart:
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    media_type = image_type(data)
    if not media_type or len(data) > MAX_BYTES:
        raise InvalidRequest("An attached picture could not be read.", param="files")
    return ImagePart(data, media_type)
