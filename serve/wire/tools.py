"""Tools and the choice among them, as any of the dialects writes them.

Function tools come nested (chat) or flat (Responses), mixed in one list; a namespace's functions
and custom tools become functions, and `Declared.origins` remembers how to answer them; kinds that
only a hosted service has (web_search, …) are skipped and reported as ignored. Used by chat.py and
responses.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from serve.errors import InvalidRequest, Unsupported
from serve.values import Tool, ToolChoice
from serve.wire import bounds
from serve.wire.body import Body

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}")
_CUSTOM_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "The tool's whole input."}},
    "required": ["input"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
class Origin:
    """How the client named a tool that the model knows under a flat name."""

    name: str
    kind: Literal["function", "custom"] = "function"
    namespace: str | None = None


@dataclass(frozen=True, slots=True)
class Declared:
    tools: tuple[Tool, ...] = ()
    origins: Mapping[str, Origin] = field(default_factory=dict)

    def origin(self, flat_name: str) -> Origin:
        return self.origins.get(flat_name, Origin(flat_name))

    def flat_name(self, name: str, namespace: str | None = None) -> str:
        """The name the model knows for what the client calls `name`; `name` itself if
        undeclared."""
        for flat, origin in self.origins.items():
            if (origin.name, origin.namespace) == (name, namespace):
                return flat
        return name


def read_tools(body: Body) -> Declared:
    bounds.TOOLS.check(len(body.list("tools") or ()), body.at("tools"))
    tools: dict[str, Tool] = {}
    origins: dict[str, Origin] = {}
    for item in body.objects("tools"):
        for tool, origin in _read_tool(item):
            name = tool.name
            if name in tools and origins[name].namespace != origin.namespace:
                name = f"{origin.namespace}__{tool.name}"
                tool = Tool(name, tool.description, tool.parameters, tool.strict)
            if tools.get(name, tool) != tool:
                raise InvalidRequest(
                    f"'{item.path}': the tool {name!r} is declared twice, differently.",
                    param=item.path,
                )
            tools[name], origins[name] = tool, origin
    return Declared(tuple(tools.values()), origins)


def _read_tool(item: Body, namespace: str | None = None) -> list[tuple[Tool, Origin]]:
    kind = item.text("type") or "function"
    if kind == "namespace" and namespace is None:
        inner = item.required_text("name")
        return [pair for each in item.objects("tools") for pair in _read_tool(each, inner)]
    if kind not in ("function", "custom"):
        item.ignore(f"type={kind}")
        return []
    said = item.object(kind) or item
    name = _name(said)
    description = said.text("description") or ""
    if kind == "custom":
        described = "\n\n".join(filter(None, (description, _grammar_text(said))))
        return [(Tool(name, described, _CUSTOM_PARAMETERS), Origin(name, "custom", namespace))]
    strict = said.flag("strict") or False
    tool = Tool(name, description, _parameters(said), strict)
    return [(tool, Origin(name, "function", namespace))]


def _name(said: Body) -> str:
    name = said.required_text("name")
    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"'{said.at('name')}' may hold letters, digits, '_', '-' and '.', at most 128.",
            param=said.at("name"),
        )
    return name


def _parameters(said: Body) -> Mapping[str, Any] | None:
    parameters = said.object("parameters")
    if parameters is None:
        return None
    check_schema(parameters)
    return parameters.data


def check_schema(schema: Body) -> None:
    bounds.SCHEMA_DEPTH.check(bounds.depth(schema.data), schema.path)
    bounds.SCHEMA_CHARS.check(len(json.dumps(schema.data)), schema.path)


def _grammar_text(said: Body) -> str:
    """A custom tool's grammar, shown to the model in words (its own syntax is not enforced)."""
    form = said.object("format")
    if form is None or form.text("type") != "grammar":
        return ""
    form = form.object("grammar") or form
    syntax, definition = form.text("syntax") or "", form.text("definition") or ""
    return f"The input follows this {syntax} grammar:\n{definition}"


def read_tool_choice(body: Body, declared: Declared) -> ToolChoice:
    value = body.get("tool_choice")
    if value is None:
        return ToolChoice()
    if isinstance(value, str):
        return _mode(body, "tool_choice", declared)
    choice = body.required_object("tool_choice")
    kind = choice.text("type")
    if kind in ("function", "custom"):
        said = choice.object(kind) or choice
        return ToolChoice("required", (_declared_name(said, declared),))
    if kind == "allowed_tools":
        said = choice.object("allowed_tools") or choice
        mode = _mode(said, "mode", declared)
        names = [
            _declared_name(tool.object("function") or tool, declared)
            for tool in said.objects("tools")
        ]
        if not names:
            raise said.wrong("tools", "a non-empty array of tools")
        return ToolChoice(mode.mode, tuple(dict.fromkeys(names)))
    raise Unsupported(
        f"'{choice.at('type')}': a choice of type {kind!r} is not supported; use none, auto, "
        "required, a function or allowed_tools.",
        param=choice.at("type"),
    )


def _mode(said: Body, name: str, declared: Declared) -> ToolChoice:
    mode = said.one_of(name, ("none", "auto", "required"))
    if mode == "required" and not declared.tools:
        raise InvalidRequest(
            f"'{said.at(name)}' is \"required\" but no tool is declared; add 'tools'.",
            param=said.at(name),
        )
    if mode == "none":
        return ToolChoice("none")
    return ToolChoice("required" if mode == "required" else "auto")


def _declared_name(said: Body, declared: Declared) -> str:
    name = declared.flat_name(said.required_text("name"), said.text("namespace"))
    if name not in declared.origins:
        known = ", ".join(declared.origins) or "none"
        raise InvalidRequest(
            f"'{said.at('name')}' names {name!r}, which is not declared. Declared: {known}.",
            param=said.at("name"),
        )
    return name
