"""A stored response's input as GET …/input_items lists it.

Items are listed as the SDK's types want them, whichever way they were sent. Pure. Used by
answers.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve.errors import InvalidRequest


def listed(items: Sequence[Mapping[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """One page: `limit` (1 to 100, default 20), `order` (asc or desc, default desc), `after`."""
    limit = query.get("limit", "20")
    if not limit.isdecimal() or not 1 <= int(limit) <= 100:
        raise InvalidRequest("'limit' must be a whole number from 1 to 100.", param="limit")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("'order' must be asc or desc.", param="order")
    found = [_listed_item(item) for item in items]
    if order == "desc":
        found.reverse()
    after = query.get("after")
    if after is not None:
        places = [i for i, item in enumerate(found) if item.get("id") == after]
        if not places:
            raise InvalidRequest("'after' names no item of this response.", param="after")
        found = found[places[0] + 1 :]
    page = found[: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else "",
        "last_id": page[-1]["id"] if page else "",
        "has_more": len(found) > len(page),
    }


def _listed_item(item: Mapping[str, Any]) -> dict[str, Any]:
    if item.get("type") != "message":
        return dict(item)
    is_assistants = item.get("role") == "assistant"
    content = item.get("content")
    if isinstance(content, str):
        kind = "output_text" if is_assistants else "input_text"
        content = [{"type": kind, "text": content}]
    if is_assistants:
        content = [
            {"annotations": [], **part} if part.get("type") == "output_text" else part
            for part in content or []
        ]
    return {"status": "completed", **item, "content": content or []}
