"""Function tools as the TypeScript types that gpt-oss was trained to read.

The text equals that of the reference library openai-harmony (tests compare the two), odd corners
included: what it writes as `any` (anyOf, $ref) is `any` here. Knows no tokens. Used by
harmony_render.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from serve.values import Tool

NAMESPACE = "functions"
_SIMPLE = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}


def tools_section(tools: Sequence[Tool]) -> str:
    """The "# Tools" part of a developer message."""
    lines = [f"## {NAMESPACE}\n", f"namespace {NAMESPACE} {{\n"]
    for tool in tools:
        lines += [f"// {line}" for line in tool.description.splitlines()]
        if tool.parameters:
            lines.append(f"type {tool.name} = (_: {type_of(tool.parameters)}) => any;\n")
        else:
            lines.append(f"type {tool.name} = () => any;\n")
    lines.append(f"}} // namespace {NAMESPACE}")
    return "# Tools\n\n" + "\n".join(lines)


def type_of(schema: Any, indent: str = "") -> str:
    """One JSON Schema as a TypeScript type; `indent` is where its lines begin."""
    if not isinstance(schema, Mapping):
        return "any"
    variants = schema.get("oneOf")
    if isinstance(variants, list):
        return "".join(
            f"\n{indent} | {_nullable(variant, indent + '   ')}{_trailing(variant)}"
            for variant in variants
        )
    kind = schema.get("type")
    if isinstance(kind, list):
        known = [_mapped(each) for each in kind if isinstance(each, str)]
        return " | ".join(known) or "any"
    if kind == "object":
        return _object(schema, indent)
    if kind == "array":
        return f"{type_of(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    if kind == "string" and _is_enum(schema):
        return " | ".join(f'"{v}"' for v in schema["enum"] if isinstance(v, str)) or "string"
    return _SIMPLE.get(kind, "any") if isinstance(kind, str) else "any"


def _mapped(kind: str) -> str:
    return "number" if kind == "integer" else kind


def _is_enum(schema: Any) -> bool:
    values = schema.get("enum") if isinstance(schema, Mapping) else None
    return isinstance(values, list) and bool(values)


def _nullable(schema: Any, indent: str) -> str:
    written = type_of(schema, indent)
    nullable = isinstance(schema, Mapping) and schema.get("nullable") is True
    return f"{written} | null" if nullable and "null" not in written else written


def _object(schema: Mapping[str, Any], indent: str) -> str:
    out = _comment(schema.get("description"), indent) + "{\n"
    properties = schema.get("properties")
    required = schema.get("required")
    names = set(map(str, required)) if isinstance(required, list) else set()
    if isinstance(properties, Mapping):
        for key, value in properties.items():
            out += _property(key + ("" if key in names else "?"), value, indent)
    return out + indent + "}"


def _comment(text: Any, indent: str) -> str:
    return f"{indent}// {text}\n" if isinstance(text, str) else ""


def _property(name: str, value: Any, indent: str) -> str:
    schema: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
    out = ""
    if isinstance(schema.get("title"), str):
        out += f"{indent}// {schema['title']}\n{indent}//\n"
    if schema.get("oneOf") is None and "oneOf" not in schema:
        out += _comment(schema.get("description"), indent)
    out += _examples(schema.get("examples"), indent)
    if isinstance(schema.get("oneOf"), list):
        return out + _union(name, schema, indent)
    out += f"{indent}{name}: {_nullable(value, indent + '    ')},"
    if "default" in schema and "oneOf" not in schema:
        out += f" // {_default(schema)}"
    return out + "\n"


def _examples(examples: Any, indent: str) -> str:
    if not isinstance(examples, list) or not examples:
        return ""
    shown = [f'{indent}// - "{example}"\n' for example in examples if isinstance(example, str)]
    return f"{indent}// Examples:\n" + "".join(shown)


def _union(name: str, schema: Mapping[str, Any], indent: str) -> str:
    """A property of several types, one on each line; a description that the first of them repeats
    is not written twice."""
    variants = schema["oneOf"]
    described = schema.get("description") if isinstance(schema.get("description"), str) else None
    first = variants[0].get("description") if variants and isinstance(variants[0], Mapping) else 0
    above = described is not None and described != first
    out = _comment(described, indent) if above else ""
    if "default" in schema:
        out += f"{indent}// {_default(schema)}\n"
    out += f"{indent}{name}:\n"
    for i, variant in enumerate(variants):
        hidden = (i == 0 and above) or (
            isinstance(variant, Mapping) and variant.get("description") == described
        )
        comment = _trailing(variant, described=not hidden, bare_enum=True)
        out += f"{indent} | {_nullable(variant, indent + '   ')}{comment}\n"
    return f"{out}{indent},\n"


def _trailing(variant: Any, *, described: bool = True, bare_enum: bool = False) -> str:
    """The comment after a variant: what it is and its default."""
    if not isinstance(variant, Mapping):
        return ""
    told = []
    if described and isinstance(variant.get("description"), str):
        told.append(variant["description"])
    if "default" in variant:
        told.append(_default(variant, bare_enum=bare_enum))
    return f" // {' '.join(told)}" if told else ""


def _default(schema: Mapping[str, Any], *, bare_enum: bool = True) -> str:
    value = schema["default"]
    if isinstance(value, str):
        return f"default: {value}" if bare_enum and _is_enum(schema) else f'default: "{value}"'
    return "default: " + json.dumps(value, ensure_ascii=False, separators=(",", ":"))
