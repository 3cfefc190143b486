"""What binds an answer of a model with tags: forced calls, strict arguments, response formats.

Reasoning stays free: what is held begins after its closing tag. Used by template.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from serve.engine.face import Grammar
from serve.errors import Unsupported
from serve.formats.dialects import CallSyntax, Reasoning
from serve.formats.grammar import TEXT, GrammarCompiler, json_rule
from serve.formats.tag_parse import Mode
from serve.values import ChatRequest, Tool

MAX_CALLS = 16  # in one answer under a forced choice; a blind model would never stop


def dialect_grammar(
    compiler: GrammarCompiler,
    request: ChatRequest,
    tools: Sequence[Tool],
    *,
    reasoning: Reasoning | None,
    syntax: CallSyntax | None,
    opens_in: Mode,
) -> Grammar | None:
    """None where nothing binds the answer. Raises InvalidRequest or Unsupported naming the
    field."""
    answer = request.response_format
    forced = bool(tools) and request.tool_choice.mode == "required"
    strict = any(tool.strict for tool in tools)
    if not (forced or strict or answer.kind != "text"):
        return None
    rules = _Rules(compiler)
    ways = []
    if tools and syntax is not None:
        ways.append(rules.calls(request, tools, syntax, forced))
    if not forced:
        ways.append(rules.final(request, bool(ways), syntax))
    thought = rules.thought(reasoning, opens_in)
    lark = [f"start: {thought}({' | '.join(ways)})", TEXT, *rules.lines]
    return compiler.compile(
        "\n".join(lark), param="response_format" if answer.kind != "text" else "tools"
    )


class _Rules:
    """Lark rules under construction."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self.lines: list[str] = []

    def thought(self, reasoning: Reasoning | None, opens_in: Mode) -> str:
        """Free text up to the tag that closes the reasoning, where there is to be any."""
        if reasoning is None or opens_in in ("after", "content"):
            return ""
        closes = self._compiler.literal(reasoning.closes)
        if closes.startswith("<["):
            self.lines.append(f"thinking: TEXT {closes}")
        else:
            self.lines.append(f"thinking[lazy]: TEXT {closes}")
        self.lines.append(r"SPACE: /[ \n]{1,4}/")
        if opens_in == "reasoning":
            return "thinking SPACE? "
        return f"({self._compiler.literal(reasoning.opens)} thinking SPACE?)? "

    def final(self, request: ChatRequest, has_calls: bool, syntax: CallSyntax | None) -> str:
        answer = request.response_format
        if answer.kind == "text":
            # Where a bare object would be a call, an answer is no object.
            is_bare = has_calls and syntax is not None and syntax.kind == "bare"
            self.lines.append(r"final: /[^{](.|\n)*/" if is_bare else "final: TEXT")
            return "final"
        schema: Any = None
        if answer.kind == "json_schema" and answer.schema is not None:
            self._compiler.check(answer.schema, "response_format.json_schema.schema")
            schema = answer.schema
        self.lines.append(f"final: {json_rule(schema)}")
        return "final"

    def calls(
        self, request: ChatRequest, tools: Sequence[Tool], syntax: CallSyntax, forced: bool
    ) -> str:
        """One call, or several where they may be parallel; text may come before a free one."""
        written = []
        for i, tool in enumerate(tools):
            head = self._compiler.literal(f"{syntax.before}{tool.name}{syntax.between}")
            arguments = self._arguments(request, tool, syntax, forced)
            after = self._compiler.literal(syntax.after + syntax.closes)
            self.lines.append(f"call_{i}: {head} {arguments} {after}".rstrip())
            written.append(f"call_{i}")
        opens = self._compiler.literal(syntax.opens)
        some = f"({' | '.join(written)})"
        self.lines.append(f"call: {opens} {some}" if opens else f"call: {some}")
        if not request.parallel_tool_calls or not syntax.closes:
            self.lines.append("calls: call")
        else:
            self.lines += [r"GAP: /\n{1,2}/", f"calls: call (GAP? call){{0,{MAX_CALLS - 1}}}"]
        if forced or not opens:
            return "calls"
        self.lines.append(
            f"said: TEXT {opens} {some}"
            if opens.startswith("<[")
            else f"said: said_open {some}\nsaid_open[lazy]: TEXT {opens}"
        )
        return "said"

    def _arguments(self, request: ChatRequest, tool: Tool, syntax: CallSyntax, forced: bool) -> str:
        at = request.tools.index(tool)
        schema = tool.parameters or {"type": "object", "properties": {}}
        if tool.strict:
            self._compiler.check(schema, f"tools[{at}].function.parameters")
        if syntax.kind == "xml":
            return self._xml(schema, at, tool.strict)
        if tool.strict:
            return json_rule(schema)
        if forced and tool.parameters and self._compiler.can_hold(tool.parameters):
            return json_rule(tool.parameters, lenient=True)
        return json_rule(None)

    def _xml(self, schema: Any, at: int, strict: bool) -> str:
        """Parameters in the schema's order, those that are required always."""
        properties = schema.get("properties")
        required = schema.get("required", ())
        written = []
        for i, (key, value) in enumerate((properties or {}).items()):
            if "$ref" in json.dumps(value) and strict:
                raise Unsupported(
                    "This model writes arguments as tags, where $ref cannot be held: write the "
                    "schema out.",
                    param=f"tools[{at}].function.parameters",
                )
            opens = self._compiler.literal(f"<parameter={key}>\n")
            name = f"value_{at}_{i}"
            self.lines += self._xml_value(name, value)
            written.append(f"({opens} {name})" + ("" if key in required else "?"))
        return " ".join(written)

    def _xml_value(self, name: str, schema: Any) -> list[str]:
        closes = self._compiler.literal("\n</parameter>\n")
        if isinstance(schema, dict) and schema.get("type") == "string":
            values = schema.get("enum")
            if isinstance(values, list) and values:
                told = " | ".join(self._compiler.literal(str(value)) for value in values)
                return [f"{name}: ({told}) {closes}"]
            return [f"{name}[lazy]: TEXT {closes}"]
        known = isinstance(schema, dict) and self._compiler.can_hold(schema)
        rule = json_rule(schema, lenient=True) if known else json_rule(None)
        return [f"{name}: {rule} {closes}"]
