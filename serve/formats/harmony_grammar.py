"""What binds a Harmony answer: forced calls, strict arguments, response formats.

Reasoning stays free: analysis and, where wanted, preambles may come first, and only the header that
then follows and the content or arguments after it are held. Used by harmony.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from serve.engine.face import Grammar
from serve.formats.grammar import TEXT, GrammarCompiler, json_rule
from serve.formats.harmony_render import Marks
from serve.values import ChatRequest, Tool


def harmony_grammar(
    compiler: GrammarCompiler, marks: Marks, request: ChatRequest, tools: Sequence[Tool]
) -> Grammar | None:
    """None where nothing binds the answer. Raises InvalidRequest naming the field."""
    answer = request.response_format
    forced = bool(tools) and request.tool_choice.mode == "required"
    strict = any(tool.strict for tool in tools)
    if not (forced or strict or answer.kind != "text"):
        return None
    lines = [TEXT]
    ways = []
    for i, tool in enumerate(tools):
        lines.append(
            f"call_{i}: {_header(marks, tool)} {_arguments(compiler, request, tool, forced)}"
        )
        ways.append(f"call_{i}")
    if not forced:
        lines.append(
            f'final: <[{marks.channel}]> "final" <[{marks.message}]> {_final(compiler, request)}'
        )
        ways.append("final")
    free = '"analysis"' if answer.kind != "text" else '("analysis" | "commentary")'
    lines += [
        f"start: aside* ({' | '.join(ways)})",
        f"aside: <[{marks.channel}]> {free} <[{marks.message}]> TEXT <[{marks.end}]> "
        f'<[{marks.start}]> "assistant"',
    ]
    param = "response_format" if answer.kind != "text" else "tools"
    return compiler.compile("\n".join(lines), param=param)


def _header(marks: Marks, tool: Tool) -> str:
    recipient = json.dumps(f"commentary to=functions.{tool.name} ", ensure_ascii=False)
    return f'<[{marks.channel}]> {recipient} <[{marks.constrain}]> "json" <[{marks.message}]>'


def _final(compiler: GrammarCompiler, request: ChatRequest) -> str:
    answer = request.response_format
    if answer.kind == "text":
        return "TEXT"
    if answer.kind == "json_schema" and answer.schema is not None:
        compiler.check(answer.schema, "response_format.json_schema.schema")
        return json_rule(answer.schema)
    return json_rule(None)


def _arguments(compiler: GrammarCompiler, request: ChatRequest, tool: Tool, forced: bool) -> str:
    """A strict tool's arguments are held to its schema; a forced call's as far as the schema can be
    held; any other's are what the model writes."""
    if tool.strict:
        at = request.tools.index(tool)
        schema = tool.parameters or {"type": "object", "properties": {}}
        compiler.check(schema, f"tools[{at}].function.parameters")
        return json_rule(schema)
    if not forced:
        return "TEXT"
    if tool.parameters and compiler.can_hold(tool.parameters):
        return json_rule(tool.parameters, lenient=True)
    return json_rule(None)
