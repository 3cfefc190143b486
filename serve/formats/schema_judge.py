"""Whether a JSON Schema can be held, asked of a process that can be stopped.

A few lines of schema can keep a compiler busy for minutes (intersections of patterns, multiples of
large numbers), and nothing inside a process can stop it. So a schema that is not plainly harmless
is first tried in a process with limits of time and memory; this file is also that process's
program, and imports nothing of ours. Used by grammar.py.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import llguidance

CPU_SECONDS = 2
WALL_SECONDS = 10.0
MEMORY_BYTES = 4 * 1024**3
TOO_LONG = "it takes too long to prepare: make it smaller, or leave patterns and references out"

# Schemas made of these alone, and no longer than this, compile in milliseconds.
_HARMLESS_BYTES = 16 * 1024
_HARMLESS = frozenset(
    "type properties required additionalProperties items enum const anyOf title description "
    "default examples minLength maxLength minItems maxItems minimum maximum nullable".split()
)
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


def judge(schema: str) -> str:
    """What keeps the schema, as JSON, from being held; "" if nothing does."""
    if len(schema) <= _HARMLESS_BYTES and _is_harmless(json.loads(schema)):
        return _compile(schema)
    try:
        done = subprocess.run(
            [sys.executable, "-P", __file__],
            input=schema.encode(),
            capture_output=True,
            timeout=WALL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return TOO_LONG
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else TOO_LONG


def _is_harmless(schema: Any) -> bool:
    """Only plain keywords, names of properties apart."""
    if isinstance(schema, list):
        return all(map(_is_harmless, schema))
    if not isinstance(schema, Mapping):
        return True
    if not _HARMLESS.issuperset(schema):
        return False
    properties = schema.get("properties")
    inner = properties.values() if isinstance(properties, Mapping) else ()
    rest = [schema.get(key) for key in ("additionalProperties", "items", "anyOf")]
    return all(map(_is_harmless, [*inner, *rest]))


def _compile(schema: str) -> str:
    """Compile on the vocabulary of the 256 bytes and ask for a first mask: what is slow is slow
    there too."""
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
    limits = llguidance.LLParserLimits(**LIMITS)
    matcher = llguidance.LLMatcher(
        llguidance.LLTokenizer("byte"), grammar, log_level=0, limits=limits
    )
    if not matcher.is_error():
        matcher.compute_bitmask()
    return str(matcher.get_error())


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.stdout.write(_compile(sys.stdin.buffer.read().decode()))


if __name__ == "__main__":
    main()
