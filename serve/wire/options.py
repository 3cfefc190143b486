"""What a request says besides messages, tools and sampling: effort, answer format, verbosity,
metadata, template arguments.

The same things have different names and places in the dialects; each reader here knows all of
them. Used by chat.py and responses.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

from serve.errors import InvalidRequest, Unsupported
from serve.values import Effort, Message, ResponseFormat, TextPart
from serve.wire import bounds
from serve.wire.body import Body
from serve.wire.tools import check_schema

EFFORTS: tuple[str, ...] = get_args(Effort)
TEMPLATE_OPTIONS = ("reasoning_effort", "enable_thinking")
_VERBOSITY = {
    "low": "Keep the answer short.",
    "high": "Answer thoroughly and in detail.",
}


def read_effort(body: Body) -> Effort | None:
    """`reasoning_effort`, `reasoning.effort` or chat_template_kwargs.reasoning_effort; the first
    given wins."""
    kwargs = body.object("chat_template_kwargs")
    places = ((body, "reasoning_effort"), (body.object("reasoning"), "effort"))
    for place, name in (*places, (kwargs, "reasoning_effort")):
        effort = place.one_of(name, EFFORTS) if place is not None else None
        if effort is not None:
            return cast(Effort, effort)
    return None


def read_template_options(body: Body) -> Mapping[str, Any]:
    """Only what is on the allow-list: a template's other arguments could change who speaks."""
    thinking = body.flag("enable_thinking")
    kwargs = body.object("chat_template_kwargs")
    if kwargs is not None:
        for name in kwargs.data:
            if name not in TEMPLATE_OPTIONS:
                raise Unsupported(
                    f"'{kwargs.at(name)}' is not allowed; allowed: {', '.join(TEMPLATE_OPTIONS)}.",
                    param=kwargs.at(name),
                )
        nested = kwargs.flag("enable_thinking")
        thinking = thinking if nested is None else nested
    return {} if thinking is None else {"enable_thinking": thinking}


def read_format(owner: Body, name: str) -> ResponseFormat:
    """`response_format` of chat (schema nested) or `text.format` of Responses (flat)."""
    said = owner.object(name)
    if said is None:
        return ResponseFormat()
    kind = said.one_of("type", ("text", "json_object", "json_schema"))
    if kind is None:
        raise said.wrong("type", "one of text, json_object, json_schema")
    if kind == "text":
        return ResponseFormat()
    if kind == "json_object":
        return ResponseFormat("json_object")
    said = said.object("json_schema") or said
    schema = said.required_object("schema")
    check_schema(schema)
    return ResponseFormat(
        "json_schema",
        schema.data,
        said.text("name", 64) or "response",
        said.text("description") or "",
        said.flag("strict") or False,
    )


def read_verbosity(body: Body) -> tuple[Message, ...]:
    """One sentence for the model, or none: no model here has a dial for it."""
    verbosity = body.one_of("verbosity", ("low", "medium", "high"))
    words = _VERBOSITY.get(verbosity or "")
    return (Message("developer", (TextPart(words),)),) if words else ()


def read_metadata(body: Body) -> dict[str, str] | None:
    metadata = body.object("metadata")
    if metadata is None:
        return None
    bounds.METADATA.check(len(metadata.data), metadata.path)
    for key, value in metadata.data.items():
        if not isinstance(value, str) or len(value) > 512 or len(key) > 64:
            raise InvalidRequest(
                f"'{metadata.at(key)}' must be a string of at most 512 characters, its key at "
                "most 64.",
                param=metadata.at(key),
            )
    return dict(metadata.data)
