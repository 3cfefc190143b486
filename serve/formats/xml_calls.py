"""Tool calls written as tags, as the Qwen coder family does:

    <tool_call><function=look><parameter=at>3</parameter></function></tool_call>

A value is text; the tool's schema says whether it is read as JSON. A call is told when it is whole.
What turns out to be no call is given back as text. Used by tag_parse.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from serve.formats.calls import CallWriter
from serve.formats.json_calls import Read
from serve.values import Tool

_FUNCTION = re.compile(r"\s*<function=([^>\n]*)>(.*?)(?:</function>\s*|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]*)>(.*?)(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)


class XmlCallReader:
    def __init__(self, calls: CallWriter, tools: Sequence[Tool], *, closes: str) -> None:
        self._calls = calls
        self._tools = {tool.name: tool for tool in tools}
        self._closes = closes
        self._buffer = ""
        self.is_over_limit = False

    def read(self, text: str, *, is_last: bool = False) -> Read:
        self._buffer += text
        told = Read()
        body, mark, rest = self._buffer.partition(self._closes)
        if not mark and not is_last:
            return told
        found = _FUNCTION.fullmatch(body)
        name = self._calls.name(found[1]) if found is not None else ""
        if found is None or not name or (is_last and not mark and "</function>" not in body):
            told.said = body
        elif self._calls.is_full:
            self.is_over_limit = True
        else:
            arguments = self._arguments(name, found[2])
            told.events += self._calls.start(name)
            told.events += self._calls.write(json.dumps(arguments, ensure_ascii=False))
        told.rest = rest
        return told

    def _arguments(self, name: str, body: str) -> dict[str, Any]:
        tool = self._tools.get(name)
        properties = (tool.parameters or {}).get("properties") if tool else None
        known: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        return {
            key.strip(): _value(text, known.get(key.strip()))
            for key, text in _PARAMETER.findall(body)
        }


def _value(text: str, schema: Any) -> Any:
    """One newline after the tag and before its end belongs to the tags."""
    text = text.removeprefix("\n").removesuffix("\n")
    if isinstance(schema, Mapping) and schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
